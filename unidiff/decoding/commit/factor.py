"""`factor`: as many as a bound on their joint error allows (Fast-dLLM, Wu et al. 2025, arXiv 2505.22618)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from unidiff.decoding.commit.base import NamedRule, take_best


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
