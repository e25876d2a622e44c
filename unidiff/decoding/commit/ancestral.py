"""`ancestral`: each position by its own coin, the reverse process on a grid of times (MDLM, arXiv 2406.07524)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from unidiff.decoding.commit.base import BlockPass, NamedRule, progress
from unidiff.decoding.config import ModalityDecoding
from unidiff.decoding.draw import UNMASK
from unidiff.diffusion.schedules import get_schedule


def unmask_chance(schedule: str, step: Tensor, steps: Tensor, sigma: Tensor | float = 0.0) -> Tensor:
    """Chance that a masked position is revealed between t = 1 - step/steps and s = t - 1/steps, float64 `[B]`.

    (alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t); sigma = 0 is the reverse process (MDLM), sigma > 0 ReMDM. In and
    after the last step it is 1.
    """
    times = get_schedule(schedule)
    alpha_t = 1 - times.masked_share(progress(step, steps))
    alpha_s = 1 - times.masked_share(progress(step + 1, steps))
    chance = (alpha_s - (1 - sigma) * alpha_t) / (1 - alpha_t)
    return torch.where(step + 1 >= steps, 1.0, chance)


class Ancestral(NamedRule):
    """A coin of `unmask_chance` for every position."""

    name = "ancestral"
    planned = True
    compares = False

    @classmethod
    def looks(cls, settings: ModalityDecoding) -> bool:
        return False

    @classmethod
    def check(cls, settings: ModalityDecoding) -> None:
        if settings.remask == "confidence":
            raise ValueError(
                "remask='confidence' does not go with rule='ancestral'; use remask='remdm' or another rule"
            )
        if settings.schedule == "fixed":
            raise ValueError(
                "rule='ancestral' needs a schedule of times, but schedule is 'fixed'; use 'linear' or 'cosine'"
            )
        cls.check_looks(settings)

    def early(self, now: BlockPass, count: Tensor, sigma: Tensor, noise: Callable[[int], Tensor]) -> Tensor | None:
        chance = unmask_chance(self.settings.schedule, now.step, now.steps, sigma)
        return now.active & (noise(UNMASK) < chance[:, None])
