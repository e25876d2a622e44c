"""Flow matching of latents: from x0 to noise along a line, and the loss of a predicted velocity.

x_s = (1 - s) x0 + s e,   v = e - x0      (Rectified Flow, arXiv 2209.03003)
"""

from __future__ import annotations

import torch
from torch import Tensor

_RATE_FLOOR = 1e-6  # logit-normal levels are finite
TRAIN_STEPS = 1000


def noisy_latents(x0: Tensor, noise: Tensor, level: Tensor) -> Tensor:
    """x_s `[B, ...]` of latents and standard normals of that shape, at the levels s `[B]` in [0, 1]."""
    s = _beside(level, x0)
    return (1 - s) * x0 + s * noise


def flow_error(velocity: Tensor, x_s: Tensor, x0: Tensor, level: Tensor) -> Tensor:
    """(x_s - s v - x0)^2 = s^2 (v - (e - x0))^2, of the shape of the latents: the squared error of the picture that the
    velocity means (D-DiT, arXiv 2501.00289, with its preconditioned outputs)."""
    return (x_s - _beside(level, x0) * velocity - x0) ** 2


def logit_normal(u: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Levels in (0, 1) whose logits are normal, of uniforms `u` (SD3, arXiv 2403.03206, section 3.1)."""
    return (mean + std * torch.special.ndtri(u.clamp(_RATE_FLOOR, 1 - _RATE_FLOOR))).sigmoid()


def trained_times(share: Tensor, steps: int = TRAIN_STEPS) -> Tensor:
    """Times of a training table that runs from `steps` down to 1, float32: entry floor(steps * share) for shares in [0, 1)."""
    index = (share * steps).long().clamp(0, steps - 1)
    return (steps - index).float()


def _beside(level: Tensor, x: Tensor) -> Tensor:
    return level.view(-1, *[1] * (x.ndim - 1)).to(x.dtype)
