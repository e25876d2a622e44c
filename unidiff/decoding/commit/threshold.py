"""`threshold`: every token that the model is sure enough of (Fast-dLLM, Wu et al. 2025, arXiv 2505.22618)."""

from __future__ import annotations

from torch import Tensor

from unidiff.decoding.commit.base import NamedRule, Slack, take_best


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
