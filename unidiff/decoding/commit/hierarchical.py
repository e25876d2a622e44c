"""`hierarchical`: runs of masked positions are filled from their surest one outwards (dInfer, arXiv 2510.08666)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from unidiff.decoding.commit.base import NamedRule, Slack
from unidiff.decoding.commit.threshold import above_threshold


def best_of_runs(confidence: Tensor, is_real: Tensor, index: Tensor, slack: Slack | None = None) -> Tensor:
    """bool `[B, n]`: the surest position of every run of real positions that are neighbours in the row; ties to the left.

    Args:
        confidence: `[B, n]`. is_real: bool `[B, n]`.
        index: int64 `[B, n]`, their positions, ascending over the real ones.
        slack: see `take_best`.
    """
    follows = is_real[:, 1:] & is_real[:, :-1] & (index[:, 1:] == index[:, :-1] + 1)
    begins = is_real & ~torch.nn.functional.pad(follows, (1, 0))
    run = (begins.long().cumsum(1) - 1).clamp_min(0)  # [B, n], the run of each entry
    score = torch.where(is_real, confidence.clamp_min(torch.finfo(confidence.dtype).min), -math.inf)
    top = torch.full_like(score, -math.inf).scatter_reduce(1, run, score, "amax").gather(1, run)
    best = is_real & (score >= (top if slack is None else top - slack(top)))
    place = torch.arange(score.shape[1], device=score.device).expand_as(run)
    first = torch.where(best, place, score.shape[1])
    left = torch.full_like(place, score.shape[1]).scatter_reduce(1, run, first, "amin")
    return best & (place == left.gather(1, run))


class Hierarchical(NamedRule):
    """What `above_threshold` takes, and the best of every run where it reaches `low_threshold`.

    Like the halves of a divide and conquer: tokens that are committed together have masked ones, or known ones, between them.
    """

    name = "hierarchical"
    has_threshold = True

    def pick(self, confidence: Tensor, score: Tensor, is_real: Tensor, count: Tensor, index: Tensor) -> Tensor:
        best = best_of_runs(confidence, is_real, index, self.slack) & (confidence >= self.settings.low_threshold)
        return above_threshold(confidence, is_real, self.settings.threshold, self.slack) | best
