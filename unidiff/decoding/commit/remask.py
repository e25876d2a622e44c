"""Remasking: which committed tokens become fresh work."""

from __future__ import annotations

import torch
from torch import Tensor

from unidiff.decoding.commit.base import ROUNDING, progress, take_best
from unidiff.diffusion.schedules import get_schedule


def unsure_tokens(confidence: Tensor, candidates: Tensor, threshold: float, budget: Tensor) -> Tensor:
    """bool `[B, L]`: committed tokens with confidence below `threshold`, the least sure first, at most `budget` per row.

    Args:
        confidence: `[B, L]`, of each token when it was committed.
        candidates: bool `[B, L]`, tokens committed in earlier passes. Those of the last pass are left out: at least one
            token more than they knew must be there before a second look can pay.
        budget: int64 `[B]`, remaskings the row has left; bounds the number of passes.
    """
    return take_best(-confidence, candidates & (confidence < threshold), budget, _equally_unsure)


def _equally_unsure(score: Tensor) -> Tensor:
    """Slack of a negative probability in float32."""
    return ROUNDING * torch.minimum(-score, 1 + score) + torch.finfo(score.dtype).eps


def remdm_sigma(schedule: str, step: Tensor, steps: Tensor, cap: float) -> Tensor:
    """ReMDM's sigma_t = min(cap, (1 - alpha_s) / alpha_t) `[B]`, the chance to mask a known token again.

    With `unmask_chance(..., sigma)` for the masked ones every marginal keeps alpha_s (arXiv 2503.00307, eq. 5); sigma
    is 0 in the last step, so the decode ends.
    """
    times = get_schedule(schedule)
    alpha_t = 1 - times.masked_share(progress(step, steps))
    rate_s = times.masked_share(progress(step + 1, steps))
    return torch.where(alpha_t > 0, rate_s / alpha_t, torch.inf).clamp_max(cap)
