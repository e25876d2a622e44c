"""Schedules by powers of t and of 1 - t: linear, log-linear, polynomial; square, root and high, which begin at t = 1."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unidiff.diffusion.schedules import Schedule


@dataclass(frozen=True)
class LogLinear(Schedule):
    """alpha = 1 - (1 - eps) t, weight 1/t (MDLM, with 1e-3)."""

    name = "loglinear"
    eps: float = 1e-3

    def mask_rate(self, t: Tensor) -> Tensor:
        return (1 - self.eps) * t

    def dalpha(self, t: Tensor) -> Tensor:
        return torch.full_like(t, self.eps - 1)

    def weight(self, t: Tensor) -> Tensor:
        return 1 / t

    def inverse_rate(self, rate: Tensor) -> Tensor:
        return rate / (1 - self.eps)


@dataclass(frozen=True)
class Linear(LogLinear):
    """alpha = 1 - t, weight 1/t."""

    name = "linear"
    eps: float = 0.0


@dataclass(frozen=True)
class Polynomial(Schedule):
    """alpha = 1 - t^power, weight power / t."""

    name = "polynomial"
    power: float = 2.0

    def __post_init__(self) -> None:
        if not self.power > 0:
            raise ValueError(f"polynomial power is {self.power}; expected a positive number")

    def mask_rate(self, t: Tensor) -> Tensor:
        return t**self.power

    def dalpha(self, t: Tensor) -> Tensor:
        return -self.power * t ** (self.power - 1)

    def weight(self, t: Tensor) -> Tensor:
        return self.power / t

    def inverse_rate(self, rate: Tensor) -> Tensor:
        return rate ** (1 / self.power)


@dataclass(frozen=True)
class _FromTheEnd(Schedule):
    """alpha = start (1 - t)^power."""

    power: float = 2.0
    start: float = 1.0

    def mask_rate(self, t: Tensor) -> Tensor:
        return 1 - self.start - self.start * torch.expm1(self.power * torch.log1p(-t))

    def rate_after(self, done: Tensor) -> Tensor:
        return 1 - self.start * done**self.power

    def alpha(self, t: Tensor) -> Tensor:
        return self.start * (1 - t) ** self.power

    def dalpha(self, t: Tensor) -> Tensor:
        return -self.start * self.power * (1 - t) ** (self.power - 1)

    def inverse_rate(self, rate: Tensor) -> Tensor:
        return -torch.expm1(torch.log1p((1 - self.start - rate) / self.start) / self.power)


@dataclass(frozen=True)
class Square(_FromTheEnd):
    """alpha = (1 - t)^2: few tokens in the first passes."""

    name = "square"


@dataclass(frozen=True)
class Root(_FromTheEnd):
    """alpha = sqrt(1 - t): most tokens in the first passes."""

    name = "root"
    power: float = 0.5


@dataclass(frozen=True)
class High(_FromTheEnd):
    """alpha = (1 - t)^2 / 2: at least half of the tokens are masked, whatever t."""

    name = "high"
    start: float = 0.5

    def draw_rate(self, u: Tensor) -> Tensor:
        return self.rate_after(u)
