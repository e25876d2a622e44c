"""Early stop of text rows: everything before the first generated end-of-text is known, so the text is complete."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from unidiff.tokens import Modality, TokenBatch


class EndOfText:
    """Finds open text positions that lie behind a finished text.

    Args:
        batch: the request; a text ends inside its own packed sample only.
        ends: ids that end a text. fill: the id that follows.
    """

    def __init__(self, batch: TokenBatch, ends: Sequence[int], fill: int) -> None:
        self.fill = fill
        self._ends = torch.tensor(tuple(ends), device=batch.ids.device)
        self._text = batch.targets & (batch.modality == Modality.TEXT)
        self._sample = batch.sample_ids.clamp_min(0)  # padding has no targets, so its sample does not matter
        self._samples = int(self._sample.max()) + 1
        self._place = torch.arange(batch.shape[1], device=batch.ids.device).expand(batch.shape)

    def closed(self, ids: Tensor, open_: Tensor) -> Tensor:
        """bool `[B, L]`: open text behind a generated end-of-text before which the sample's text has no open position."""
        waiting = open_ & self._text
        first_open = self._first(waiting)
        finished = self._text & ~open_ & torch.isin(ids, self._ends) & (self._place < first_open)
        return waiting & (self._place > self._first(finished))

    def _first(self, where: Tensor) -> Tensor:
        """Per position, the first place of its sample where the flag is set; L where it never is. int64 `[B, L]`."""
        length = where.shape[1]
        places = torch.where(where, self._place, length)
        first = places.new_full((where.shape[0], self._samples), length)
        return first.scatter_reduce(1, self._sample, places, "amin").gather(1, self._sample)
