"""Noise schedules: alpha(t), its derivative, the ELBO weight and the inverse, each stable at both ends; and how t is drawn.

t runs from 0 (clean) to 1 (all masked); `1 - alpha(t)`, the mask rate, is the chance that a token is hidden at t.
Several different functions are called "cosine" in the literature; the names here say which one is meant.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Schedule(ABC):
    """A noise schedule. Every method is elementwise, keeps shape and dtype, and differentiates.

    A schedule states its mask rate and derivative in forms without cancellation; the rest follows.
    """

    @abstractmethod
    def mask_rate(self, t: Tensor) -> Tensor:
        """1 - alpha(t), accurate for small t."""

    @abstractmethod
    def dalpha(self, t: Tensor) -> Tensor:
        """alpha'(t) <= 0."""

    @abstractmethod
    def inverse_rate(self, rate: Tensor) -> Tensor:
        """The t at which the mask rate equals `rate`."""

    def alpha(self, t: Tensor) -> Tensor:
        """Chance that a token is still visible at t."""
        return 1 - self.mask_rate(t)

    def weight(self, t: Tensor) -> Tensor:
        """-alpha'(t) / (1 - alpha(t)): the NELBO weight of the masked positions (MDLM, arXiv 2406.07524, eq. 10)."""
        return -self.dalpha(t) / self.mask_rate(t)

    def inverse(self, alpha: Tensor) -> Tensor:
        """The t at which alpha(t) equals `alpha`."""
        return self.inverse_rate(1 - alpha)

    def sigma(self, t: Tensor) -> Tensor:
        """Total noise -log alpha(t), the input of time-conditioned networks; infinite where alpha is 0."""
        rate = self.mask_rate(t)
        return -torch.where(rate < 0.5, torch.log1p(-rate), torch.log(self.alpha(t)))  # accurate at both ends

    def dsigma(self, t: Tensor) -> Tensor:
        """d sigma / dt = -alpha' / alpha."""
        return -self.dalpha(t) / self.alpha(t)


@dataclass(frozen=True)
class LogLinear(Schedule):
    """alpha = 1 - (1 - eps) t, weight 1/t. With `eps = 0` this is the linear schedule; MDLM uses 1e-3."""

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
class MaskGitCosine(Schedule):
    """alpha = 1 - sin(pi t / 2), weight (pi/2) cot(pi t / 2) (MaskGIT, Muddit, dLLM)."""

    def mask_rate(self, t: Tensor) -> Tensor:
        return torch.sin(math.pi / 2 * t)

    def alpha(self, t: Tensor) -> Tensor:
        return 2 * torch.sin(math.pi / 4 * (1 - t)).square()  # 1 - cos(x) = 2 sin^2(x/2): no cancellation near t = 1

    def dalpha(self, t: Tensor) -> Tensor:
        return -math.pi / 2 * torch.sin(math.pi / 2 * (1 - t))

    def inverse_rate(self, rate: Tensor) -> Tensor:
        return 2 / math.pi * torch.asin(rate)

    def inverse(self, alpha: Tensor) -> Tensor:
        return 1 - 4 / math.pi * torch.asin(torch.sqrt(alpha / 2))


@dataclass(frozen=True)
class MdlmCosine(Schedule):
    """alpha = eps + (1 - eps) cos(pi t / 2), weight (pi/2) cot(pi t / 4)."""

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

    eps: float = 1e-3

    def mask_rate(self, t: Tensor) -> Tensor:
        return (1 - self.eps) * torch.sin(math.pi / 2 * t).square()

    def dalpha(self, t: Tensor) -> Tensor:
        return -(1 - self.eps) * math.pi / 2 * torch.sin(math.pi * t)

    def weight(self, t: Tensor) -> Tensor:
        return math.pi * torch.sin(math.pi / 2 * (1 - t)) / torch.sin(math.pi / 2 * t)

    def inverse_rate(self, rate: Tensor) -> Tensor:
        return 2 / math.pi * torch.asin(torch.sqrt(rate / (1 - self.eps)))


@dataclass(frozen=True)
class Polynomial(Schedule):
    """alpha = 1 - t^power, weight power / t."""

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

    def inverse(self, alpha: Tensor) -> Tensor:
        return self.inverse_sigma(-torch.log(alpha))


@dataclass(frozen=True)
class Geometric(_SigmaSchedule):
    """sigma = sigma_min^(1-t) sigma_max^t (SEDD)."""

    def sigma(self, t: Tensor) -> Tensor:
        return torch.exp(math.log(self.sigma_min) + t * math.log(self.sigma_max / self.sigma_min))

    def dsigma(self, t: Tensor) -> Tensor:
        return self.sigma(t) * math.log(self.sigma_max / self.sigma_min)

    def inverse_sigma(self, sigma: Tensor) -> Tensor:
        return torch.log(sigma / self.sigma_min) / math.log(self.sigma_max / self.sigma_min)


@dataclass(frozen=True)
class SigmaLinear(_SigmaSchedule):
    """sigma = sigma_min + t (sigma_max - sigma_min), which MDLM's code calls "linear"."""

    sigma_max: float = 7.0

    def sigma(self, t: Tensor) -> Tensor:
        return self.sigma_min + t * (self.sigma_max - self.sigma_min)

    def dsigma(self, t: Tensor) -> Tensor:
        return torch.full_like(t, self.sigma_max - self.sigma_min)

    def inverse_sigma(self, sigma: Tensor) -> Tensor:
        return (sigma - self.sigma_min) / (self.sigma_max - self.sigma_min)


@dataclass(frozen=True)
class Linear(LogLinear):
    """alpha = 1 - t, weight 1/t."""

    eps: float = 0.0


_SCHEDULES: dict[str, type[Schedule]] = {
    "linear": Linear,
    "loglinear": LogLinear,
    "maskgit_cosine": MaskGitCosine,
    "mdlm_cosine": MdlmCosine,
    "mdlm_cosine_squared": MdlmCosineSquared,
    "geometric": Geometric,
    "sigma_linear": SigmaLinear,
    "polynomial": Polynomial,
}


def get_schedule(name: str, **kwargs: float) -> Schedule:
    """The schedule called `name`, with its parameters: `eps`, `power`, or `sigma_min` and `sigma_max`.

    Raises:
        ValueError: an unknown name, or a parameter that this schedule does not have.
    """
    if name not in _SCHEDULES:
        raise ValueError(f"unknown schedule {name!r}; expected one of {sorted(_SCHEDULES)}")
    try:
        return _SCHEDULES[name](**kwargs)
    except TypeError as error:
        raise ValueError(f"schedule {name!r} does not take {sorted(kwargs)}: {error}") from error


def sample_times(
    n: int,
    u: Tensor,
    mode: str = "stratified",
    *,
    index: Tensor | None = None,
    rotation: Tensor | float = 0.0,
    low: float = 0.0,
    schedule: Schedule | None = None,
    rate_range: tuple[float, float] = (1e-3, 1.0),
) -> Tensor:
    """Times in (low, 1) from uniforms; nothing is drawn here, so times may be keyed by global sample index.

    Args:
        n: number of strata, normally the *global* batch size.
        u: uniforms `[B]`.
        mode: `iid`: z = u. `stratified`: z = ((k + u)/n + rotation) mod 1 for sample k, which MDLM calls antithetic.
            `importance`: stratified z, then t with log(1 - alpha(t)) linear in z; the loss weight then is the
            constant `importance_weight(rate_range)` in place of -alpha'/(1 - alpha).
        index: int64 `[B]`, place k of each sample in the global batch (taken modulo n); 0..B-1 when left out.
        rotation: one shared uniform per global batch makes each single time uniform; 0 gives MDLM's strata.
        low: z is squeezed into (low, 1). Any low > 0 biases the NELBO; MDLM trains with 1e-3.
        schedule, rate_range: for `importance`; the mask rates at z = 0 and z = 1.
    """
    if mode not in ("iid", "stratified", "importance"):
        raise ValueError(f"unknown time sampling {mode!r}; expected 'iid', 'stratified' or 'importance'")
    if mode == "importance" and schedule is None:
        raise ValueError("importance sampling of times needs a schedule; pass schedule=get_schedule(...)")
    z = u
    if mode != "iid":
        index = torch.arange(len(u), device=u.device) if index is None else index
        z = torch.remainder((index % n + u) / n + rotation, 1.0)
        # a float remainder may land on 0, where weights are infinite
        z = z.clamp_min(torch.finfo(z.dtype).tiny)
    z = low + (1 - low) * z
    return z if mode != "importance" or schedule is None else importance_times(z, schedule, rate_range)


def importance_times(z: Tensor, schedule: Schedule, rate_range: tuple[float, float] = (1e-3, 1.0)) -> Tensor:
    """t whose mask rate is low^(1-z) high^z, so that the density of t is proportional to -alpha'/(1 - alpha)."""
    low, high = rate_range
    if not 0 < low < high <= 1:
        raise ValueError(f"rate_range {rate_range} must satisfy 0 < low < high <= 1")
    return schedule.inverse_rate(torch.exp((1 - z) * math.log(low) + z * math.log(high)))


def importance_weight(rate_range: tuple[float, float] = (1e-3, 1.0)) -> float:
    """The constant log(high / low) that replaces the ELBO weight under `importance` times."""
    return math.log(rate_range[1] / rate_range[0])
