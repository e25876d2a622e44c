"""`hierarchical`: besides what is sure, the best of every run of neighbours (dInfer, arXiv 2510.08666)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from unidiff.decoding.commit.base import NamedRule
from unidiff.decoding.commit.threshold import above_threshold


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
