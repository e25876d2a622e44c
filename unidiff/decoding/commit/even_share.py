"""`even_share`: the rule of LLaDA2.0-Uni's "Sprint" decoding (inclusionAI 2026), for comparisons with it."""

from __future__ import annotations

from torch import Tensor

from unidiff.decoding.commit.at_least import AtLeast
from unidiff.decoding.commit.base import BlockPass, take_best
from unidiff.decoding.draw import Choice


class EvenShare(AtLeast):
    """The surest positions of a block, as many as ceil(masked / passes left), of its `block_steps` or of its share of `steps`, and
    every position whose token has a probability above `threshold`, whatever measure ranks them.
    """

    name = "even_share"

    def count(self, now: BlockPass) -> Tensor:
        left = ((self.settings.block_steps or now.steps) - now.step).clamp_min(1)
        return (now.remaining + left - 1).div(left, rounding_mode="floor")

    def pick(self, confidence: Tensor, score: Tensor, is_real: Tensor, count: Tensor, index: Tensor) -> Tensor:
        sure = is_real & (confidence > self.settings.threshold)
        return sure | take_best(score, is_real, count, self.ranking_slack)

    def picked(self, choice: Choice, score: Tensor, is_real: Tensor, count: Tensor, index: Tensor) -> Tensor:
        return self.pick(choice.probability, score, is_real, count, index)
