"""A schedule."""

from dataclasses import dataclass

from torch import Tensor

from unidiff.diffusion.schedules import Schedule


@dataclass(frozen=True)
class Quartic(Schedule):
    """alpha = 1 - t^4: most of the time much is hidden."""

    name = "quartic"

    def mask_rate(self, t: Tensor) -> Tensor:
        return t.pow(4)

    def dalpha(self, t: Tensor) -> Tensor:
        return -4 * t.pow(3)

    def inverse_rate(self, rate: Tensor) -> Tensor:
        return rate.pow(0.25)
