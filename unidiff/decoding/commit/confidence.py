"""Rules that go by confidences and end by themselves.

`threshold` and `factor` are Fast-dLLM's (Wu et al. 2025, arXiv 2505.22618), `hierarchical` and `credit` dInfer's (arXiv
2510.08666).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from unidiff.decoding.commit.base import NamedRule, Slack, take_best
from unidiff.decoding.config import ModalityDecoding


def above_threshold(confidence: Tensor, is_real: Tensor, threshold: float, slack: Slack | None = None) -> Tensor:
    """bool `[B, n]`: every real position with confidence >= threshold, and the best one where none reaches it."""
    sure = is_real & (confidence >= threshold)
    return sure | take_best(confidence, is_real, (~sure.any(1)).long(), slack)


class Threshold(NamedRule):
    """What `above_threshold` takes."""

    name = "threshold"
    has_threshold = True

    def pick(self, confidence: Tensor, score: Tensor, is_real: Tensor, count: Tensor, index: Tensor) -> Tensor:
        return above_threshold(confidence, is_real, self.settings.threshold, self.slack)


def factor_count(confidence: Tensor, is_real: Tensor, factor: float) -> Tensor:
    """int64 `[B]`: length of the longest prefix of the descending confidences with c_r >= 1 - factor / (r + 1), r from 1.

    At least one. (The strict form: what is accepted is exactly that prefix.)
    """
    ranked = torch.where(is_real, confidence, -math.inf).sort(dim=1, descending=True).values
    rank = torch.arange(1, ranked.shape[1] + 1, device=ranked.device)
    fits = ranked >= 1 - factor / (rank + 1)
    fits[:, 0] = True
    return torch.minimum(fits.long().cumprod(1).sum(1), is_real.sum(1))


class Factor(NamedRule):
    """The `factor_count` surest positions."""

    name = "factor"

    def pick(self, confidence: Tensor, score: Tensor, is_real: Tensor, count: Tensor, index: Tensor) -> Tensor:
        return take_best(confidence, is_real, factor_count(confidence, is_real, self.settings.factor), self.slack)


class Hierarchical(NamedRule):
    """What `above_threshold` takes, and the best of every run of neighbours in the row where it reaches `low_threshold`.

    Like the halves of a divide and conquer: tokens that are committed together have masked ones, or known ones, between them.
    """

    name = "hierarchical"
    has_threshold = True

    def pick(self, confidence: Tensor, score: Tensor, is_real: Tensor, count: Tensor, index: Tensor) -> Tensor:
        follows = is_real[:, 1:] & is_real[:, :-1] & (index[:, 1:] == index[:, :-1] + 1)
        begins = is_real & ~torch.nn.functional.pad(follows, (1, 0))
        run = (begins.long().cumsum(1) - 1).clamp_min(0)  # [B, n], the run of each entry
        sure = torch.where(is_real, confidence.clamp_min(torch.finfo(confidence.dtype).min), -math.inf)
        top = torch.full_like(sure, -math.inf).scatter_reduce(1, run, sure, "amax").gather(1, run)
        best = is_real & (sure >= (top if self.slack is None else top - self.slack(top)))
        place = torch.arange(sure.shape[1], device=sure.device).expand_as(run)
        first = torch.where(best, place, sure.shape[1])
        left = torch.full_like(place, sure.shape[1]).scatter_reduce(1, run, first, "amin")  # ties go to the left
        best = best & (place == left.gather(1, run)) & (confidence >= self.settings.low_threshold)
        return above_threshold(confidence, is_real, self.settings.threshold, self.slack) | best


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
