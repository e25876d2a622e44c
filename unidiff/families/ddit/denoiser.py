"""D-DiT's network behind the sampler's interface, and the T5 that reads its texts.

One row holds a text and, as continuous features, the patches of a picture's latents. T5 reads the noisy ids themselves, so every
token that is written changes the features of all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from unidiff.models.block import Condition
from unidiff.models.denoiser import CachePlan, DenoiserTraits, LayerFlops, PartialHidden, Select
from unidiff.models.dual_mmdit import DualMMDiT
from unidiff.models.mmdit_blocks import plain_norm
from unidiff.models.store import FeatureStore, StoreOptions
from unidiff.schema import Depth, Epsilon, Rows, Width
from unidiff.tokens import Modality, TokenBatch, Vocabulary
from unidiff.tokens.batch import CONTINUOUS
from unidiff.weights.model import load_text_encoder

LAYOUT = (
    "this network takes rows of a text and then one picture, or of a text, without padding; decode other rows apart"
)
T5_TYPES: Mapping[str, Any] = {
    "vocab_size": Rows,
    **dict.fromkeys(("d_model", "d_kv", "d_ff"), Width),
    **dict.fromkeys(("num_layers", "num_heads"), Depth),
    **dict.fromkeys(("relative_attention_num_buckets", "relative_attention_max_distance"), Width),
    "layer_norm_epsilon": Epsilon,
    "feed_forward_proj": str,
}
"""Types of the keys of T5's config."""


class T5Text:
    """Text ids to features.

    Args:
        encoder: transformers' `T5EncoderModel`; taken over, set to evaluation mode. The row of its table that stands for
            [MASK] is part of the released weights.
    """

    def __init__(self, encoder: Any) -> None:
        self.encoder = encoder.eval()
        self.rows = int(encoder.get_input_embeddings().num_embeddings)
        self.width = int(encoder.config.d_model)

    @classmethod
    def from_folder(cls, folder: Path, dtype: torch.dtype | None = None) -> T5Text:
        """Of a released folder: its `text_encoder`; None for a dtype keeps the checkpoint's.

        Raises:
            FileNotFoundError: no text encoder. ValueError: weights that do not fit.
        """
        from transformers import T5EncoderModel

        expected = "a D-DiT folder with T5's encoder in it"
        return cls(load_text_encoder(T5EncoderModel, folder, dtype, T5_TYPES, expected))

    @torch.no_grad()
    def __call__(self, ids: Tensor) -> Tensor:
        """int64 `[B, L]` to `[B, L, J]`, all of them attended to; on the CPU `ValueError` for an unknown id."""
        if ids.device.type == "cpu" and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.rows:
            raise ValueError(f"text ids span {int(ids.min())} to {int(ids.max())}; T5 knows 0 to {self.rows - 1}")
        device = self.encoder.get_input_embeddings().weight.device
        return self.encoder(input_ids=ids.to(device)).last_hidden_state


@dataclass(eq=False)
class DualDenoiser:
    """A `PartialDenoiser` for the words of D-DiT: given pictures are clean, so the time is 0.

    Every row is a text and then the patches of one picture `[h, w, C p p]` as continuous features (`Span.continuous`), or a text
    alone; all rows of a request are alike. A picture that guidance hides is replaced by the network's tokens for none. A
    partial pass recomputes tokens of the plan; T5 always reads the whole text.

    Args:
        model, vocabulary: of the checkpoint. encoder: reads the texts.
    """

    model: DualMMDiT
    encoder: T5Text
    vocabulary: Vocabulary

    @property
    def traits(self) -> DenoiserTraits:
        """See `PartialDenoiser`; T5's own work is not counted."""
        d = self.model.config.num_heads * self.model.config.head_dim
        layer = LayerFlops(*(2 * d * d,) * 4, 16 * d * d, 4 * d)
        layers = (layer,) * self.model.num_blocks
        return DenoiserTraits(self.vocabulary.size, d, layers, affine_head=True, recordable=False)

    def hidden(
        self,
        ids: Tensor,
        modality: Tensor,
        positions: Tensor,
        attention_mask: Tensor | None = None,
        time: Tensor | None = None,
        features: Tensor | None = None,
    ) -> Tensor:
        """Features `[B, L, D]` for `head`; arguments as `Denoiser.hidden`, `features` the patches at their places.

        Raises:
            ValueError: padding or packed samples, or rows of different layout.
        """
        length, size, some, every = _layout(ids, modality, positions, attention_mask)
        words = self.encoder(ids[:, :length])
        vector = self.model.time_features(torch.zeros(len(ids), device=ids.device))
        if features is None or not some:
            return self._run(words, self.model.null_image.expand(len(ids), -1, -1), vector, ids.shape[1])
        image = self.model.read(features[:, length:].unflatten(1, size))
        out = self._run(words, image, vector, ids.shape[1])
        if every:
            return out
        hidden = (ids[:, length:] != CONTINUOUS).any(1).nonzero()[:, 0]
        none = self.model.null_image.expand(len(hidden), -1, -1)
        return out.index_copy(0, hidden, self._run(words[hidden], none, vector[hidden], ids.shape[1]))

    def _run(self, words: Tensor, image: Tensor, vector: Tensor, length: int) -> Tensor:
        """Normed features `[B, length, D]` of texts and the tokens of pictures; 0 for pictures that have no tokens."""
        parts = self.model.run_blocks(self.model.read_text(words), image, Condition(F.silu(vector)))
        out = plain_norm(torch.cat(parts, dim=1))
        return F.pad(out, (0, 0, 0, max(0, length - out.shape[1])))[:, :length]

    def head(self, hidden: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """`[..., D]` to logits of the ids `[start, stop)`."""
        return self.model.text_head(hidden, start, stop)

    def make_store(self, batch: TokenBatch, options: StoreOptions | None = None) -> FeatureStore:
        """See `PartialDenoiser`; `ValueError` for rows without pictures, or in which guidance hides them."""
        length, size, _, every = _layout(batch.ids, batch.modality, batch.positions, batch.attention_mask())
        if batch.features is None or not every:
            raise ValueError("caches of this family need rows with a picture; leave cache out")
        tokens = self.model.read(batch.features[:, length:].unflatten(1, size))
        store = self.model.make_store(len(batch.ids), length, tokens.shape[1], options)
        store.inputs["image"] = F.pad(tokens, (0, 0, length, 0))
        return store

    def partial(
        self,
        ids: Tensor,
        plan: CachePlan,
        store: FeatureStore,
        time: Tensor | None = None,
        select: Select | None = None,
    ) -> PartialHidden:
        """See `PartialDenoiser.partial`."""
        length = store.layout.border
        if bool((ids[:, length:] != CONTINUOUS).any()):
            raise ValueError("guidance that hides the picture goes with no cache in this family; leave one of them out")
        words, vector = (
            self.encoder(ids[:, :length]),
            self.model.time_features(torch.zeros(len(ids), device=ids.device)),
        )
        return self.model.partial(words, store.inputs["image"][:, length:], vector, plan, store, select)

    def shifted(self, hidden: Tensor, positions: Tensor) -> Tensor:
        """See `PartialDenoiser.shifted`: they are ready as they are."""
        return hidden


def _layout(
    ids: Tensor, modality: Tensor, positions: Tensor, attention_mask: Tensor | None
) -> tuple[int, tuple[int, int], bool, bool]:
    """Tokens of the text of all rows, rows and columns of patches behind it ((0, 0) for none), and whether some and whether
    all pictures are shown. The device is read once."""
    drawn = modality[0] == Modality.IMAGE  # [L]
    shown = ((ids == CONTINUOUS) | ~drawn).all(1)  # [B]
    same, ordered = (modality == modality[:1]).all(), (drawn[1:] >= drawn[:-1]).all()
    size = torch.where(drawn[:, None], positions[0, :, 1:] + 1, 0).amax(0)  # [2]
    facts = torch.stack([(~drawn).sum(), same, ordered, *size, shown.any(), shown.all()])
    length, alike, text_first, height, width, some, every = facts.tolist()
    if attention_mask is not None or not (alike and text_first and length) or height * width != len(drawn) - length:
        raise ValueError(LAYOUT)
    return length, (height, width), bool(some), bool(every)
