"""`credit`: what tokens have earned in earlier passes counts (dInfer, arXiv 2510.08666)."""

from __future__ import annotations

import torch
from torch import Tensor

from unidiff.decoding.commit.threshold import Threshold
from unidiff.decoding.config import ModalityDecoding


class Credit(Threshold):
    """`threshold`, after adding to the logits what every token has earned at every target.

    In each pass C <- decay C, then the best token of a position earns p^power, and its logits become
    logits + weight log(1 + C). Memory: one number per target and token of the modality's slice.
    """

    name = "credit"
    adjusts = "credit_weight"

    def __init__(self, settings: ModalityDecoding, targets: Tensor) -> None:
        super().__init__(settings, targets)
        self._slot = targets.long().cumsum(1) - 1  # [B, L], place among the targets
        self._slots = int(targets.sum(1).max())
        self._earned: Tensor | None = None  # [B, slots + 1, V]; the last takes the padding of an index

    def adjust(self, logits: Tensor, index: Tensor, is_real: Tensor) -> Tensor:
        """Logits `[B, n, V]` with what their tokens have earned, this pass included."""
        if self._earned is None:
            self._earned = logits.new_zeros(logits.shape[0], self._slots + 1, logits.shape[2])
        slot = torch.where(is_real, self._slot.gather(1, index), self._slots)[..., None]  # [B, n, 1]
        slot = slot.expand(-1, -1, logits.shape[2])
        earned = self._earned.gather(1, slot) * self.settings.credit_decay
        best = logits.double().softmax(-1).max(-1, keepdim=True)
        earned = earned.scatter_add(2, best.indices, best.values.pow(self.settings.credit_power).to(earned.dtype))
        self._earned = self._earned.scatter(1, slot, earned)
        return logits + self.settings.credit_weight * earned.log1p()

    def forget(self, where: Tensor) -> None:
        """Positions bool `[B, L]` that were masked again start from nothing."""
        if self._earned is not None:
            gone = torch.zeros_like(self._earned[..., 0], dtype=torch.bool)
            slot = torch.where(where, self._slot, self._slots)
            self._earned = self._earned.masked_fill(gone.scatter(1, slot, True)[..., None], 0.0)
