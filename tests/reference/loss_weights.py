"""Loss weights as functions of time, and of the number of masked positions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from unidiff.diffusion.schedules import Schedule


def time_weight(kind: str, schedule: Schedule, t: Tensor, gamma: float = 5.0, floor: float = 1e-3) -> Tensor:
    """Per-row loss weight at times t.

    Args:
        kind: `elbo`: -alpha'/(1 - alpha). `softmin_snr`: -alpha'/((1 - alpha) + alpha/gamma), the ELBO weight with a
            soft cap (UniDisc, gamma 5). `muddit`: 1/max(r, floor), r the mask rate. `ce`: 1 (MMaDA's plain CE).
            Only `elbo` bounds the likelihood.
    """
    if kind == "elbo":
        return schedule.weight(t)
    if kind == "softmin_snr":
        return -schedule.dalpha(t) / (schedule.mask_rate(t) + schedule.alpha(t) / gamma)
    if kind == "muddit":
        return 1 / schedule.mask_rate(t).clamp_min(floor)
    if kind == "ce":
        return torch.ones_like(t)
    raise ValueError(f"unknown weight {kind!r}; expected 'elbo', 'softmin_snr', 'muddit' or 'ce'")


def cosine_count(u: Tensor, length: Tensor | int) -> Tensor:
    """Muddit's number of masked positions, round(L cos(pi u / 2)), int64; the weight that makes it exact is below."""
    return torch.round(length * torch.cos(math.pi / 2 * u)).long()


def cosine_count_weight(count: Tensor, length: Tensor | int) -> Tensor:
    """1 / (n P(n)): the exact NELBO weight on the CE sum when n = `cosine_count(u, L)` positions are masked.

    P(n) = (2/pi) [asin(min(1, (n + 1/2)/L)) - asin((n - 1/2)/L)]. Muddit's own 1/r is this only approximately.

    Returns:
        float64, 0 where `count` is 0 (there is no loss there).
    """
    n = count.double()
    upper = torch.asin(((n + 0.5) / length).clamp_max(1))
    probability = 2 / math.pi * (upper - torch.asin(((n - 0.5) / length).clamp(-1, 1)))
    return torch.where(count > 0, 1 / (n * probability), 0.0)
