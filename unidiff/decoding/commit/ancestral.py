"""`ancestral`: the reverse process on a grid of times, and ReMDM's way to mask again."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from unidiff.decoding.commit.base import BlockPass, NamedRule, progress
from unidiff.decoding.config import ModalityDecoding
from unidiff.decoding.draw import UNMASK
from unidiff.diffusion.schedules import get_schedule


class Ancestral(NamedRule):
    """A coin of `unmask_chance` for every position: the reverse process on a grid of times (MDLM, arXiv 2406.07524)."""

    name = "ancestral"
    planned = blind = foretold = True

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

    def early(self, now: BlockPass, count: Tensor, noise: Callable[[int], Tensor]) -> Tensor | None:
        own = self.settings
        sigma = remdm_sigma(own.schedule, now.step, now.steps, own.remask_cap) if own.remask == "remdm" else 0.0
        chance = unmask_chance(own.schedule, now.step, now.steps, sigma)
        return now.active & (noise(UNMASK) < chance[:, None])


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


def remdm_sigma(schedule: str, step: Tensor, steps: Tensor, cap: float) -> Tensor:
    """ReMDM's sigma_t = min(cap, (1 - alpha_s) / alpha_t) `[B]`, the chance to mask a known token again.

    With `unmask_chance(..., sigma)` for the masked ones every marginal keeps alpha_s (arXiv 2503.00307, eq. 5); sigma
    is 0 in the last step, so the decode ends.
    """
    times = get_schedule(schedule)
    alpha_t = 1 - times.masked_share(progress(step, steps))
    rate_s = times.masked_share(progress(step + 1, steps))
    return torch.where(alpha_t > 0, rate_s / alpha_t, torch.inf).clamp_max(cap)
