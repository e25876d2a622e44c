"""Time conditioning: the sinusoidal embedding and adaLN modulation (DiT, Peebles and Xie 2023)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Condition(NamedTuple):
    """What the layers are conditioned on, and which tokens it reaches.

    Attributes:
        vector: `[B, cond_dim]`.
        shifted: bool `[B, L, 1]`, tokens whose normed input is shifted and scaled; None for all.
        gated: bool `[B, L, 1]`, tokens whose branch output is gated; None for all.
    """

    vector: Tensor
    shifted: Tensor | None = None
    gated: Tensor | None = None


class Modulation(NamedTuple):
    """adaLN of one residual branch, each broadcastable to `[B, L, D]`."""

    shift: Tensor
    scale: Tensor
    gate: Tensor


class TimeEmbedding(nn.Module):
    """Time `[B]` to the condition `[B, cond_dim]`: 256 sinusoidal features (cos first), Linear, SiLU, Linear, SiLU."""

    features = 256
    max_period = 10_000.0

    def __init__(self, cond_dim: int) -> None:
        super().__init__()
        self.up = nn.Linear(self.features, cond_dim)
        self.down = nn.Linear(cond_dim, cond_dim)

    def forward(self, time: Tensor) -> Tensor:
        half = self.features // 2
        exponent = torch.arange(half, dtype=torch.float32, device=time.device) / half
        angles = time.float()[:, None] * torch.exp(-math.log(self.max_period) * exponent)  # [B, 128]
        embedded = torch.cat((angles.cos(), angles.sin()), dim=-1).to(self.up.weight.dtype)
        return F.silu(self.down(F.silu(self.up(embedded))))


class AdaLN(nn.Module):
    """The condition to modulation vectors: `branches` times (shift, scale, gate), or one (shift, scale).

    Zero-initialised, so a gated branch starts as the identity.
    """

    def __init__(self, cond_dim: int, size: int, branches: int | None) -> None:
        super().__init__()
        self.branches = branches
        self.linear = nn.Linear(cond_dim, (2 if branches is None else 3 * branches) * size)

    def forward(self, condition: Condition | None) -> list[Modulation]:
        """One `Modulation` per branch; with `branches=None` one whose gate is 1."""
        assert condition is not None, "a time-conditioned model makes a condition in every pass"
        parts = self.linear(condition.vector)[:, None].chunk(2 if self.branches is None else 3 * self.branches, dim=-1)
        if self.branches is None:
            parts = (*parts, torch.ones_like(parts[0]))
        reach = ((condition.shifted, 0.0), (condition.shifted, 0.0), (condition.gated, 1.0))
        restricted = [
            part if where is None else torch.where(where, part, neutral)
            for part, (where, neutral) in zip(parts, reach * (len(parts) // 3), strict=True)
        ]
        return [Modulation(*restricted[i : i + 3]) for i in range(0, len(restricted), 3)]


def modulate(x: Tensor, modulation: Modulation | None) -> Tensor:
    """x (1 + scale) + shift; without a modulation x itself."""
    return x if modulation is None else x * (1 + modulation.scale) + modulation.shift


def gate(h: Tensor, modulation: Modulation | None) -> Tensor:
    """gate . h; without a modulation h itself."""
    return h if modulation is None else modulation.gate * h
