"""Schedules by circular functions. Several of them are called "cosine" in the literature; MaskGIT's has the plain name."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from unidiff.diffusion.schedules import Schedule


@dataclass(frozen=True)
class Cosine(Schedule):
    """alpha = 1 - sin(pi t / 2), weight (pi/2) cot(pi t / 2) (MaskGIT, Muddit, dLLM)."""

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
    """alpha = eps + (1 - eps) cos(pi t / 2), weight (pi/2) cot(pi t / 4)."""

    name = "mdlm_cosine"
    eps: float = 1e-3

    def mask_rate(self, t: Tensor) -> Tensor:
        return 2 * (1 - self.eps) * torch.sin(math.pi / 4 * t).square()

    def dalpha(self, t: Tensor) -> Tensor:
        return -(1 - self.eps) * math.pi / 2 * torch.sin(math.pi / 2 * t)

    def weight(self, t: Tensor) -> Tensor:
        return math.pi / 2 / torch.tan(math.pi / 4 * t)

    def inverse_rate(self, rate: Tensor) -> Tensor:
        return 4 / math.pi * torch.asin(torch.sqrt(rate / (2 * (1 - self.eps))))


@dataclass(frozen=True)
class MdlmCosineSquared(Schedule):
    """alpha = eps + (1 - eps) cos^2(pi t / 2), weight pi cot(pi t / 2)."""

    name = "mdlm_cosine_squared"
    eps: float = 1e-3

    def mask_rate(self, t: Tensor) -> Tensor:
        return (1 - self.eps) * torch.sin(math.pi / 2 * t).square()

    def dalpha(self, t: Tensor) -> Tensor:
        return -(1 - self.eps) * math.pi / 2 * torch.sin(math.pi * t)

    def weight(self, t: Tensor) -> Tensor:
        return math.pi * torch.sin(math.pi / 2 * (1 - t)) / torch.sin(math.pi / 2 * t)

    def inverse_rate(self, rate: Tensor) -> Tensor:
        return 2 / math.pi * torch.asin(torch.sqrt(rate / (1 - self.eps)))
