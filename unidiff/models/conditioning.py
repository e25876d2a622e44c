"""Time conditioning: the sinusoidal embedding and adaLN modulation (DiT, Peebles and Xie 2023)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Modulation(NamedTuple):
    """Shift, scale and gate of one residual branch, broadcastable to `[B, L, D]`."""

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
    """The condition `[B, cond_dim]` to `count` modulation vectors, each `[B, 1, D]`, or per token where restricted.

    Zero-initialised, so a gated branch starts as the identity.
    """

    def __init__(self, cond_dim: int, size: int, count: int) -> None:
        super().__init__()
        self.count = count
        self.linear = nn.Linear(cond_dim, count * size)

    def forward(self, cond: Tensor) -> tuple[Tensor, ...]:
        return self.linear(cond)[:, None].chunk(self.count, dim=-1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift."""
    return x * (1 + scale) + shift
