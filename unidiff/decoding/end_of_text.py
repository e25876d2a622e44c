"""`EndOfText`: where the texts of a decode are finished."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from unidiff.tokens import Modality, TokenBatch


class EndOfText:
    """Finds masked text positions that lie behind a finished text: everything before its first end-of-text is known.

    `ends` are the ids that end a text, inside its own packed sample only, of which a row has at most `samples`; `fill` is
    the id that follows.
    """

    def __init__(self, batch: TokenBatch, samples: int, ends: Sequence[int], fill: int) -> None:
        self.fill, self._samples, self._ends = fill, samples, tuple(ends)
        self._text = batch.targets & (batch.modality == Modality.TEXT)
        self._sample = batch.sample_ids.clamp_min(0)  # padding has no targets, so its sample does not matter
        self._place = torch.arange(batch.shape[1], device=batch.ids.device).expand(batch.shape)

    def closed(self, ids: Tensor, masked: Tensor, settled: Tensor | None = None) -> Tensor:
        """bool `[B, L]`: masked text behind a generated end-of-text before which the sample's text has no masked position;
        only in rows bool `[B]` that are `settled`, where it matters."""
        waiting = masked & self._text
        finished = self._written(ids, masked) & (self._place < self._first(waiting))
        closed = waiting & (self._place > self._first(finished))
        return closed if settled is None else closed & settled[:, None]

    def behind(self, ids: Tensor, masked: Tensor) -> Tensor:
        """bool `[B, L]`: masked text behind a generated end-of-text, whatever is masked before that."""
        return masked & self._text & (self._place > self._first(self._written(ids, masked)))

    def _written(self, ids: Tensor, masked: Tensor) -> Tensor:
        """bool `[B, L]`: generated ends."""
        return self._text & ~masked & torch.stack([ids == end for end in self._ends]).any(0)

    def _first(self, where: Tensor) -> Tensor:
        """Per position, the first place of its sample where the flag is set; L where it never is. int64 `[B, L]`."""
        length = where.shape[1]
        places = torch.where(where, self._place, length)
        first = places.new_full((where.shape[0], self._samples), length)
        return first.scatter_reduce(1, self._sample, places, "amin").gather(1, self._sample)
