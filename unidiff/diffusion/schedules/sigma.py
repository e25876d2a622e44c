"""Schedules by their total noise sigma(t) = -log alpha(t), as SEDD and MDLM's code state them."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from unidiff.diffusion.schedules import Schedule


@dataclass(frozen=True)
class _SigmaSchedule(Schedule):
    """alpha = exp(-sigma(t)); sigma runs from `sigma_min` to `sigma_max`, so alpha(0) < 1 and alpha(1) > 0."""

    sigma_min: float = 1e-3
    sigma_max: float = 8.0

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max:
            raise ValueError(f"sigma range ({self.sigma_min}, {self.sigma_max}) must satisfy 0 < sigma_min < sigma_max")

    @abstractmethod
    def inverse_sigma(self, sigma: Tensor) -> Tensor:
        """The t at which the total noise equals `sigma`."""

    def mask_rate(self, t: Tensor) -> Tensor:
        return -torch.expm1(-self.sigma(t))

    def alpha(self, t: Tensor) -> Tensor:
        return torch.exp(-self.sigma(t))

    def dalpha(self, t: Tensor) -> Tensor:
        return -self.dsigma(t) * self.alpha(t)

    def weight(self, t: Tensor) -> Tensor:
        return self.dsigma(t) / torch.expm1(self.sigma(t))

    def inverse_rate(self, rate: Tensor) -> Tensor:
        return self.inverse_sigma(-torch.log1p(-rate))


@dataclass(frozen=True)
class Geometric(_SigmaSchedule):
    """sigma = sigma_min^(1-t) sigma_max^t (SEDD)."""

    name = "geometric"

    def sigma(self, t: Tensor) -> Tensor:
        return torch.exp(math.log(self.sigma_min) + t * math.log(self.sigma_max / self.sigma_min))

    def dsigma(self, t: Tensor) -> Tensor:
        return self.sigma(t) * math.log(self.sigma_max / self.sigma_min)

    def inverse_sigma(self, sigma: Tensor) -> Tensor:
        return torch.log(sigma / self.sigma_min) / math.log(self.sigma_max / self.sigma_min)


@dataclass(frozen=True)
class SigmaLinear(_SigmaSchedule):
    """sigma = sigma_min + t (sigma_max - sigma_min), which MDLM's code calls "linear"."""

    name = "sigma_linear"
    sigma_max: float = 7.0

    def sigma(self, t: Tensor) -> Tensor:
        return self.sigma_min + t * (self.sigma_max - self.sigma_min)

    def dsigma(self, t: Tensor) -> Tensor:
        return torch.full_like(t, self.sigma_max - self.sigma_min)

    def inverse_sigma(self, sigma: Tensor) -> Tensor:
        return (sigma - self.sigma_min) / (self.sigma_max - self.sigma_min)
