"""`logits = forward(plan)`: the one place where the sampler reaches the model, with one stream per guidance condition."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from unidiff.decoding.stats import DecodeStats
from unidiff.models.partial import CachePlan
from unidiff.tokens import Modality, TokenBatch, Vocabulary


class Denoiser(Protocol):
    """What the sampler needs of a model: features of every position, and a head that can be sliced."""

    def hidden(
        self,
        ids: Tensor,
        modality: Tensor,
        positions: Tensor,
        attention_mask: Tensor | None,
        time: Tensor | None = None,
    ) -> Tensor:
        """ids, modality int64 `[B, L]`, positions int64 `[B, L, 3]`, mask bool `[B, 1, L, L]` -> `[B, L, D]`.

        `time` float `[B]` is diffusion time; a model without time conditioning ignores it.
        """
        ...

    def head(self, hidden: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """`[..., D]` -> logits `[..., stop - start]` of the vocabulary slice."""
        ...


@dataclass(frozen=True)
class PositionLogits:
    """Logits of one modality where they were asked for.

    Attributes:
        index: int64 `[B, n]`, positions in the row. live: bool `[B, n]`, False on padding of the index.
        values: float32 or float64 `[streams, B, n, V]` over the modality's slice, conditional stream first.
    """

    index: Tensor
    live: Tensor
    values: Tensor


def gather_positions(wanted: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The wanted positions `[B, L]` of each row as an index `[B, count]` in ascending order, and which entries are real."""
    index = (~wanted).long().argsort(dim=1, stable=True)[:, :count]
    return index, wanted.gather(1, index)


class Forward:
    """Runs the model for one request and keeps the last features of every stream.

    Args:
        model: see `Denoiser`.
        vocabulary: for [MASK] and the modality slices.
        batch: the request; its layout does not change.
        hides: bool `[B, L]` per unconditional stream, what it does not see.
    """

    def __init__(self, model: Denoiser, vocabulary: Vocabulary, batch: TokenBatch, hides: Sequence[Tensor]) -> None:
        self._model = model
        self._vocabulary = vocabulary
        self._layout = batch
        self._attention = batch.attention_mask()
        self._mask_ids = torch.where(batch.modality == Modality.IMAGE, vocabulary.image_mask, vocabulary.mask_id)
        self._hides = [torch.zeros_like(batch.given), *hides]
        self._features: dict[int, Tensor] = {}  # stream -> [B, L, D]
        self.stats = DecodeStats()

    def run(self, ids: Tensor, plan: CachePlan, streams: Sequence[int], time: Tensor) -> None:
        """Compute the features of `plan.query` in the given streams; elsewhere those of earlier passes stay.

        Args:
            ids: int64 `[B, L]`, current tokens.
            streams: 0 is the conditional one, k the k-th of `hides`.
            time: `[B]`, diffusion time.
        """
        missing = any(s not in self._features for s in streams)
        if plan.query is not None and not missing and not bool(plan.query.any()):
            self.stats.reused_passes += 1
            return
        rows = [torch.where(self._hides[s], self._mask_ids, ids) for s in streams]
        n, layout = len(streams), self._layout
        mask = self._attention
        fresh = self._model.hidden(
            torch.cat(rows),  # [S * B, L]
            layout.modality.repeat(n, 1),
            layout.positions.repeat(n, 1, 1),
            None if mask is None else mask.repeat(n, 1, 1, 1),
            time.float().repeat(n),
        )
        self._count(plan.query is None or missing, n)
        for stream, features in zip(streams, fresh.chunk(n), strict=True):
            if plan.query is not None and stream in self._features:
                features = torch.where(plan.query[..., None], features, self._features[stream])
            self._features[stream] = features

    def _count(self, full: bool, streams: int) -> None:
        self.stats.evaluations += streams
        self.stats.full_passes += full
        self.stats.partial_passes += not full
        self.stats.model_tokens += streams * self._layout.ids.numel()

    def logits(self, modality: Modality, wanted: Tensor, count: int, streams: Sequence[int]) -> PositionLogits:
        """The head of `modality`, at the wanted positions `[B, L]` only (at most `count` per row)."""
        index, live = gather_positions(wanted, count)
        start, stop = self._vocabulary.range_of(modality)
        self.stats.head_tokens += len(streams) * index.numel()
        features = [self._features[s] for s in streams]
        picked = torch.stack([f.gather(1, index[..., None].expand(-1, -1, f.shape[-1])) for f in features])
        return PositionLogits(index, live, self._model.head(picked, start, stop))  # [S, B, n, V]
