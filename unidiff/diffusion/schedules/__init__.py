"""Noise schedules: the only place where alpha(t), the mask rate and its inverse are written.

t runs from 0 (clean) to 1 (all masked); `1 - alpha(t)`, the mask rate, is the chance that a token is hidden at t. A decode
runs from t = 1 down to 0. A new schedule is a new file here: a frozen dataclass with a `name`, a mask rate, its inverse and
the derivative of alpha. Training (`tasks.*.rate`) and decoding (`schedule`) then know it by name.
"""

from __future__ import annotations

from functools import cache

from unidiff.diffusion.schedules.base import Schedule
from unidiff.registry import Registry

__all__ = ["SCHEDULES", "Schedule", "get_schedule"]


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
