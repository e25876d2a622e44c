"""Noise schedules: the only place where alpha(t), the mask rate and its inverse are written.

t runs from 0 (clean) to 1 (all masked); `1 - alpha(t)`, the mask rate, is the chance that a token is hidden at t. A decode
runs from t = 1 down to 0. A new schedule is a new file here: a frozen dataclass with a `name`, a mask rate, its inverse and
the derivative of alpha. Training (`tasks.*.rate`) and decoding (`schedule`) then know it by name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from unidiff.registry import Registry


@dataclass(frozen=True)
class Schedule(ABC):
    """What a schedule states, and what follows from it. Methods are elementwise, keep shape and dtype, and differentiate.

    Formulas have no cancellation at either end of (0, 1). `name` is what settings call it.
    """

    name: ClassVar[str]

    @abstractmethod
    def mask_rate(self, t: Tensor) -> Tensor:
        """1 - alpha(t), accurate for small t."""

    @abstractmethod
    def dalpha(self, t: Tensor) -> Tensor:
        """alpha'(t) <= 0."""

    @abstractmethod
    def inverse_rate(self, rate: Tensor) -> Tensor:
        """The t at which the mask rate equals `rate`."""

    def rate_after(self, done: Tensor) -> Tensor:
        """Mask rate at t = 1 - done, accurate for small `done`."""
        return self.mask_rate(1 - done)

    def masked_share(self, done: Tensor) -> Tensor:
        """Share still masked after a share `done` of a decode: `rate_after`, and exactly 0 at 1."""
        return torch.where(done >= 1, 0.0, self.rate_after(done))

    def draw_rate(self, u: Tensor) -> Tensor:
        """A mask rate from a uniform `u`, which stands for t (or for 1 - t, where the field writes it so)."""
        return self.mask_rate(u)

    def chance_below(self, rate: Tensor) -> Tensor:
        """P(mask rate <= rate) where t is uniform: the distribution of `draw_rate`."""
        lowest, highest = (self.mask_rate(torch.full_like(rate, end)) for end in (0, 1))
        return self.inverse_rate(torch.minimum(torch.maximum(rate, lowest), highest))

    def alpha(self, t: Tensor) -> Tensor:
        """Chance that a token is still visible at t."""
        return 1 - self.mask_rate(t)

    def weight(self, t: Tensor) -> Tensor:
        """-alpha'(t) / (1 - alpha(t)): the NELBO weight of the masked positions (MDLM, arXiv 2406.07524, eq. 10)."""
        return -self.dalpha(t) / self.mask_rate(t)

    def sigma(self, t: Tensor) -> Tensor:
        """Total noise -log alpha(t), the input of time-conditioned networks; infinite where alpha is 0."""
        rate = self.mask_rate(t)
        return -torch.where(rate < 0.5, torch.log1p(-rate), torch.log(self.alpha(t)))  # accurate at both ends

    def dsigma(self, t: Tensor) -> Tensor:
        """d sigma / dt = -alpha' / alpha."""
        return -self.dalpha(t) / self.alpha(t)


def _name_of(value: object) -> str | None:
    return vars(value).get("name") if isinstance(value, type) and issubclass(value, Schedule) else None


SCHEDULES: Registry[type[Schedule]] = Registry("schedules", __name__, _name_of)


@cache
def get_schedule(name: str, **kwargs: float) -> Schedule:
    """The schedule called `name`, with its parameters: `eps`, `power`, or `sigma_min` and `sigma_max`.

    Raises:
        ValueError: an unknown name, or a parameter that this schedule does not have.
    """
    kind = SCHEDULES.get_or_refuse(name, "schedule")
    try:
        return kind(**kwargs)
    except TypeError as error:
        raise ValueError(f"schedule {name!r} does not take {sorted(kwargs)}: {error}") from error
