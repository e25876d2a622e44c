"""CLIP as Muddit and Meissonic read it: features before the last layer, a pooled vector, and a row for text [MASK]."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from unidiff.errors import read_json
from unidiff.schema import Between, Depth, Epsilon, Index, Rows, Width
from unidiff.weights.files import check_dtype, check_finite, check_tensor, load_torch
from unidiff.weights.model import load_checked

MASK_EMBEDDING = "mask_token_embedding.pth"
MASKING_SCHEDULES = ("cosine", "linear")

_TOKEN_ID = Index | None
CLIP_TYPES: Mapping[str, Any] = {
    **dict.fromkeys(("vocab_size", "max_position_embeddings"), Rows),
    **dict.fromkeys(("hidden_size", "intermediate_size", "projection_dim"), Width),
    **dict.fromkeys(("num_hidden_layers", "num_attention_heads"), Depth),
    **dict.fromkeys(("bos_token_id", "pad_token_id"), _TOKEN_ID),
    "eos_token_id": Index,  # the pooled vector is that of this token
    **dict.fromkeys(("dtype", "torch_dtype"), Literal["float64", "float32", "float16", "bfloat16"] | None),
    "layer_norm_eps": Epsilon,
    "hidden_act": str,
    "attention_dropout": Annotated[float, Between(0, 1)],
}
"""Types of the keys of CLIP's config."""


class TextFeatures(NamedTuple):
    """What the network sees of a text: `sequence` `[B, T, text_dim]` and `pooled` `[B, pooled_dim]`."""

    sequence: Tensor
    pooled: Tensor


class ClipText:
    """Text ids to features.

    Args:
        encoder: transformers' `CLIPTextModelWithProjection`; taken over, set to evaluation mode, and its table grows
            by one row with `mask_embedding`.
        mask_embedding: float `[hidden_size]`, the row of text [MASK] (released as `mask_token_embedding.pth`), whose id
            is the size of the encoder's vocabulary; None where only whole texts are read.

    Attributes:
        mask_id: the id of text [MASK].
        length: T, the number of positions.
        end_id: the id of the end token. (Older CLIP configs name 2, which is none of their tokens' roles: it is the last.)
        reads_masks: whether there is a row for [MASK].
    """

    def __init__(self, encoder: Any, mask_embedding: Tensor | None = None) -> None:
        self.encoder = encoder.eval()
        table = encoder.get_input_embeddings()
        self.mask_id = int(table.num_embeddings)
        self.length = int(encoder.config.max_position_embeddings)
        end = encoder.config.eos_token_id
        self.end_id = end if isinstance(end, int) and end != 2 else self.mask_id - 1
        self.reads_masks = mask_embedding is not None
        if mask_embedding is not None:
            row = mask_embedding.reshape(-1)
            if row.shape != table.weight.shape[1:] or not bool(torch.isfinite(row).all()):
                raise ValueError(
                    f"the mask embedding has shape {tuple(mask_embedding.shape)}; expected {table.weight.shape[1]} finite numbers"
                )
            grown = torch.cat((table.weight.detach(), row[None].to(table.weight)))
            encoder.set_input_embeddings(nn.Embedding.from_pretrained(grown, freeze=False))

    @classmethod
    def from_folder(
        cls, folder: Path, dtype: torch.dtype | None = None, mask_embedding: Path | None = None
    ) -> ClipText:
        """Of a released folder: its `text_encoder`, with text [MASK]'s row where there is one.

        Args:
            dtype: of the weights; None keeps the checkpoint's.
            mask_embedding: the file of the row; None looks for `mask_token_embedding.pth` in the folder and beside it.

        Raises:
            FileNotFoundError: no text encoder, or no such file.
            ValueError: weights that do not fit, or a row of another size.
        """
        from transformers import CLIPTextModelWithProjection

        if not (folder / "text_encoder").is_dir():
            raise FileNotFoundError(f"{folder} has no text_encoder; name a Muddit or Meissonic folder")
        encoder, _ = load_checked(
            CLIPTextModelWithProjection.from_pretrained,
            "CLIPTextModelWithProjection",
            str(folder / "text_encoder"),
            types=CLIP_TYPES,
            dtype="auto" if dtype is None else dtype,
            local_files_only=True,
            trust_remote_code=False,
            attn_implementation="sdpa",  # a config may name a kernel on the hub, which is code of others
        )
        places = [mask_embedding] if mask_embedding else [folder / MASK_EMBEDDING, folder.parent / MASK_EMBEDDING]
        row = next((_read_row(place) for place in places if mask_embedding or os.path.lexists(place)), None)
        try:
            return cls(encoder, row)
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from error

    @property
    def device(self) -> torch.device:
        return self.encoder.get_input_embeddings().weight.device

    @torch.no_grad()
    def __call__(self, ids: Tensor) -> TextFeatures:
        """int64 `[B, T]` to features. The pooled vector is that of the first end token, as CLIP's config defines it.

        Raises:
            ValueError: more positions than the encoder has, an unknown id, or [MASK] without a mask embedding.
        """
        if ids.ndim != 2 or ids.shape[1] > self.length:
            raise ValueError(f"text ids have shape {tuple(ids.shape)}; expected [B, T] with T at most {self.length}")
        largest = int(ids.max())
        if largest > self.mask_id or int(ids.min()) < 0:
            raise ValueError(f"text id {largest} is unknown; ids run from 0 to {self.mask_id} ([MASK])")
        if largest == self.mask_id and not self.reads_masks:
            raise ValueError("the text holds [MASK] but no mask embedding was given; pass mask_token_embedding.pth")
        out = self.encoder(input_ids=ids.to(self.device), output_hidden_states=True)
        return TextFeatures(out.hidden_states[-2], out.text_embeds)


class TextMarks(NamedTuple):
    """Ids that begin and end a text, and that it is filled up with."""

    bos: int
    eos: int
    pad: int

    @classmethod
    def of(cls, folder: Path, tokenizer: Any) -> TextMarks:
        """Of the tokenizer in a folder; `ValueError` where it names one of them not."""
        ids = {name: getattr(tokenizer, f"{name}_token_id") for name in cls._fields}
        if absent := [name for name, i in ids.items() if i is None]:
            raise ValueError(f"{folder / 'tokenizer'} names no {absent[0]}_token, which CLIP's texts need; name one")
        return cls(**ids)


def scheduler_masking(folder: Path) -> str:
    """The schedule that a folder's `scheduler` names; cosine where there is none."""
    path, name = folder / "scheduler" / "scheduler_config.json", "cosine"
    if os.path.lexists(path):
        config = read_json(path, "a scheduler's config")
        if not {"_class_name", "masking_schedule"} & set(config):
            raise ValueError(f"{path} is no scheduler's config: it names neither _class_name nor masking_schedule")
        name = config.get("masking_schedule", name)
    if name not in MASKING_SCHEDULES:
        raise ValueError(f"{folder}: masking_schedule is {name!r:.80}; expected one of {list(MASKING_SCHEDULES)}")
    return name


def _read_row(path: Path) -> Tensor:
    if not os.path.lexists(path):
        raise FileNotFoundError(f"{path} does not exist; name the file of the mask embedding")
    row = load_torch(path)
    if not isinstance(row, Tensor):
        raise ValueError(f"{path} holds a {type(row).__name__}; expected one tensor")
    check_tensor(path, "the mask embedding", row)
    check_dtype(f"the mask embedding of {path}", row)
    check_finite({"the mask embedding": row}, str(path))
    return row
