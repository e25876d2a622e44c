"""`describe`: what a checkpoint is and needs, from its headers alone; no weight is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from unidiff.families.checkpoint.config_keys import section
from unidiff.families.checkpoint.load import load_released
from unidiff.families.family import Released
from unidiff.models.mmdit import MMDiT
from unidiff.models.transformer import MaskedTransformer
from unidiff.tokens import Vocabulary

DEFAULT_TOKENS = 1024
LONGEST_TOKENS = 2**24
"""Lengths above this one are a config's way of saying "no limit"."""


@dataclass(frozen=True)
class Description:
    """What `info` prints.

    Attributes:
        family: name. image_tokenizer: family of the codes that it reads.
        dtypes: number of parameters by dtype.
        weight_bytes: of weights and buffers, as stored or in the dtype asked for.
        tokens: length of the row that `pass_bytes` is for; None for an image tokenizer.
        pass_bytes: estimate of what one pass at batch 1 adds: the widest layer, and the logits of every token.
        vocabulary: id layout.
        settings: of our model.
    """

    family: str
    image_tokenizer: str | None
    dtypes: Mapping[str, int]
    weight_bytes: int
    tokens: int | None
    pass_bytes: int
    vocabulary: Vocabulary | None
    settings: Mapping[str, Any]

    @property
    def parameters(self) -> int:
        return sum(self.dtypes.values())

    def lines(self) -> dict[str, str]:
        """For people: names and values."""
        kinds = ", ".join(f"{name} {count / self.parameters:.0%}" for name, count in self.dtypes.items())
        out = {
            "family": self.family,
            "parameters": f"{self.parameters:,}",
            "dtype": kinds if len(self.dtypes) > 1 else next(iter(self.dtypes), "none"),
            "memory": f"{gigabytes(self.weight_bytes)} of weights",
        }
        if self.tokens is not None:
            out["memory"] += f" + about {gigabytes(self.pass_bytes)} for a pass over {self.tokens} tokens at batch 1"
        if (v := self.vocabulary) is not None:
            images = f", image codes {v.image[0]}-{v.image[1] - 1}" if v.image_size else ", no images"
            masks = f"{v.mask_id}" if v.image_mask == v.mask_id else f"{v.mask_id} and {v.image_mask}"
            out["vocabulary"] = f"{v.size} ids: text {v.text[0]}-{v.text[1] - 1}{images}, [MASK] {masks}"
        return out | ({"image tokenizer": self.image_tokenizer} if self.image_tokenizer else {})


def describe(name: str | Path, **options: Any) -> Description:
    """Family, size, vocabulary and memory of a released or converted checkpoint.

    Args:
        name, options: as in `load_released`; `dtype` changes the memory.

    Raises:
        FileNotFoundError, ValueError: as `load_released`; names and shapes are checked, values are not.
    """
    released = load_released(name, device="meta", **options)
    dtypes: Counter[str] = Counter()
    for parameter in released.model.parameters():
        dtypes[str(parameter.dtype).removeprefix("torch.")] += parameter.numel()
    tokens = row_length(released)
    return Description(
        family=released.family.name,
        image_tokenizer=released.family.image_tokenizer,
        dtypes=dict(dtypes.most_common()),
        weight_bytes=sum(value.nbytes for value in released.model.state_dict().values()),
        tokens=tokens,
        pass_bytes=0 if tokens is None else pass_bytes(released.model, tokens),
        vocabulary=released.vocabulary,
        settings=plain_settings(released.model),
    )


def plain_settings(model: Any) -> dict[str, Any]:
    """The constructor arguments of a model; sequences as lists, as a saved config has them."""
    settings = ((name, value) for name, value in dict(model.config).items() if not name.startswith("_"))
    return {name: list(value) if isinstance(value, tuple) else value for name, value in settings}


def row_length(released: Released) -> int | None:
    """Tokens of the longest row that the config speaks of; `DEFAULT_TOKENS` where it does not."""
    if released.vocabulary is None:
        return None
    outer = section(released.config, "config") or released.config
    for key in ("max_sequence_length", "length", "max_position_embeddings"):
        for value in (outer.get(key), section(outer, "model").get(key)):
            if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= LONGEST_TOKENS:
                return value
    return DEFAULT_TOKENS


def pass_bytes(model: nn.Module, tokens: int) -> int:
    """Rough memory of one forward pass at batch 1: residual, queries, keys, values, the inner layer, and all logits."""
    width = next(model.parameters()).element_size()
    if isinstance(model, MaskedTransformer):
        c = model.config
        first: Any = model.blocks[0]
        inner = first.feed_forward.up.weight.shape[0]
        return tokens * (width * (6 * c.hidden_size + 2 * inner) + 4 * c.vocab_size)
    assert isinstance(model, MMDiT)
    size = model.config.num_heads * model.config.head_dim
    rows = max(model.config.codebook_size, model.config.text_vocab_size or 0)
    return tokens * (width * 16 * size + 4 * rows)


def gigabytes(count: int) -> str:
    """`1.41 GB`, or MB below a tenth of that."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
