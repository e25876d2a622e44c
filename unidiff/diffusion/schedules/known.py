"""The schedules of the literature: by powers of t and of 1 - t, by circular functions, and by the total noise sigma(t)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

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


@dataclass(frozen=True)
class Cosine(Schedule):
    """alpha = 1 - sin(pi t / 2), weight (pi/2) cot(pi t / 2) (MaskGIT, Muddit, dLLM). Others have "cosines" of their own."""

    name = "cosine"

    def mask_rate(self, t: Tensor) -> Tensor:
        return torch.sin(math.pi / 2 * t)

    def rate_after(self, done: Tensor) -> Tensor:
        return torch.cos(math.pi / 2 * done)

    def draw_rate(self, u: Tensor) -> Tensor:
        return self.rate_after(u)

    def alpha(self, t: Tensor) -> Tensor:
        return 2 * torch.sin(math.pi / 4 * (1 - t)).square()  # 1 - cos(x) = 2 sin^2(x/2): no cancellation near t = 1

    def dalpha(self, t: Tensor) -> Tensor:
        return -math.pi / 2 * torch.sin(math.pi / 2 * (1 - t))

    def inverse_rate(self, rate: Tensor) -> Tensor:
        return 2 / math.pi * torch.asin(rate)


@dataclass(frozen=True)
class ArcCosine(Schedule):
    """alpha = (2/pi) asin(1 - t), the mirror image of `Cosine`: most tokens in the first passes."""

    name = "arccos"

    def mask_rate(self, t: Tensor) -> Tensor:
        return 4 / math.pi * torch.asin(torch.sqrt(t / 2))  # acos(1 - t) without cancellation

    def rate_after(self, done: Tensor) -> Tensor:
        return torch.acos(done) * (2 / math.pi)

    def dalpha(self, t: Tensor) -> Tensor:
        return -2 / math.pi / torch.sqrt(t * (2 - t))

    def inverse_rate(self, rate: Tensor) -> Tensor:
        return 2 * torch.sin(math.pi / 4 * rate).square()


@dataclass(frozen=True)
class MdlmCosine(Schedule):
    """alpha = eps + (1 - eps) cos(pi t / 2) = 1 - a (1 - eps) sin^2(b t) with a = 2, b = pi / 4; weight 2 b cot(b t)."""

    name = "mdlm_cosine"
    a: ClassVar[float] = 2
    b: ClassVar[float] = math.pi / 4
    eps: float = 1e-3

    def mask_rate(self, t: Tensor) -> Tensor:
        return self.a * (1 - self.eps) * torch.sin(self.b * t).square()

    def dalpha(self, t: Tensor) -> Tensor:
        return -self.a * (1 - self.eps) * self.b * torch.sin(2 * self.b * t)

    def weight(self, t: Tensor) -> Tensor:
        return 2 * self.b / torch.tan(self.b * t)

    def inverse_rate(self, rate: Tensor) -> Tensor:
        return 1 / self.b * torch.asin(torch.sqrt(rate / (self.a * (1 - self.eps))))


@dataclass(frozen=True)
class MdlmCosineSquared(MdlmCosine):
    """alpha = eps + (1 - eps) cos^2(pi t / 2), the same with a = 1, b = pi / 2."""

    name = "mdlm_cosine_squared"
    a = 1
    b = math.pi / 2

    def weight(self, t: Tensor) -> Tensor:
        # sin(pi (1 - t) / 2) is cos(pi t / 2) without cancellation near t = 1
        return math.pi * torch.sin(math.pi / 2 * (1 - t)) / torch.sin(math.pi / 2 * t)


@dataclass(frozen=True)
class _SigmaSchedule(Schedule):
    """alpha = exp(-sigma(t)); sigma runs from `sigma_min` to `sigma_max`, so alpha(0) < 1 and alpha(1) > 0."""

    sigma_min: float = 1e-3
    sigma_max: float = 8.0

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max:
            raise ValueError(f"sigma range ({self.sigma_min}, {self.sigma_max}) must satisfy 0 < sigma_min < sigma_max")

    def mask_rate(self, t: Tensor) -> Tensor:
        return -torch.expm1(-self.sigma(t))

    def alpha(self, t: Tensor) -> Tensor:
        return torch.exp(-self.sigma(t))

    def dalpha(self, t: Tensor) -> Tensor:
        return -self.dsigma(t) * self.alpha(t)

    def weight(self, t: Tensor) -> Tensor:
        return self.dsigma(t) / torch.expm1(self.sigma(t))


@dataclass(frozen=True)
class Geometric(_SigmaSchedule):
    """sigma = sigma_min^(1-t) sigma_max^t (SEDD)."""

    name = "geometric"

    def sigma(self, t: Tensor) -> Tensor:
        return torch.exp(math.log(self.sigma_min) + t * math.log(self.sigma_max / self.sigma_min))

    def dsigma(self, t: Tensor) -> Tensor:
        return self.sigma(t) * math.log(self.sigma_max / self.sigma_min)

    def inverse_rate(self, rate: Tensor) -> Tensor:
        return torch.log(-torch.log1p(-rate) / self.sigma_min) / math.log(self.sigma_max / self.sigma_min)


@dataclass(frozen=True)
class SigmaLinear(_SigmaSchedule):
    """sigma = sigma_min + t (sigma_max - sigma_min), which MDLM's code calls "linear"."""

    name = "sigma_linear"
    sigma_max: float = 7.0

    def sigma(self, t: Tensor) -> Tensor:
        return self.sigma_min + t * (self.sigma_max - self.sigma_min)

    def dsigma(self, t: Tensor) -> Tensor:
        return torch.full_like(t, self.sigma_max - self.sigma_min)

    def inverse_rate(self, rate: Tensor) -> Tensor:
        return (-torch.log1p(-rate) - self.sigma_min) / (self.sigma_max - self.sigma_min)
