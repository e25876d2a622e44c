"""A commit rule."""

from torch import Tensor

from unidiff.decoding.commit.base import NamedRule, take_best


class Apart(NamedRule):
    """The surest candidates of every other position, so that no two neighbours are filled in one pass."""

    name = "apart"

    def pick(self, confidence: Tensor, score: Tensor, is_real: Tensor, count: Tensor, index: Tensor) -> Tensor:
        best = take_best(score, is_real, is_real.sum(1).clamp_max(1), self.slack)
        parity = (index * best).sum(1, keepdim=True) % 2  # of the best candidate's place
        same = is_real & (index % 2 == parity)
        return take_best(score, same, (same.sum(1) + 1) // 2, self.slack)
