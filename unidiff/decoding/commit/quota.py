"""`quota`: a schedule says how many positions a pass fills, confidences say which."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from unidiff.decoding.commit.base import BlockPass, NamedRule, progress, take_best
from unidiff.decoding.config import ModalityDecoding
from unidiff.decoding.draw import ORDER
from unidiff.diffusion.schedules import get_schedule


def quota(schedule: str, start: Tensor, remaining: Tensor, step: Tensor, steps: Tensor) -> Tensor:
    """How many positions a row commits in this pass, int64 `[B]`; at least one while any remain, all in the last pass.

    Where there are enough, one is left for each pass to come, so that a block of no fewer tokens than passes makes all of them.

    Args:
        schedule: of `unidiff.diffusion.schedules`, or `fixed` (LLaDA): n // steps, plus one in the first n % steps passes.
        start, remaining, step, steps: see `BlockPass`. What remains differs from the plan after remasking, and the quota
            catches up.
    """
    last = step + 1 >= steps
    if schedule == "fixed":
        taken = (step + 1) * (start // steps) + torch.minimum(step + 1, start % steps)
        keep = start - taken
    else:
        keep = (start * get_schedule(schedule).masked_share(progress(step + 1, steps)) + 1e-9).floor().long()
    keep = torch.maximum(keep, steps - step - 1)  # `root` would be done early
    count = torch.where(last, remaining, remaining - keep)
    return torch.maximum(count, (remaining > 0).long()).clamp_max(remaining)


class Quota(NamedRule):
    """The surest positions, as many as `schedule` says; random ones with confidence "random"."""

    name = "quota"
    planned = capped = True
    compares = False

    @classmethod
    def looks(cls, settings: ModalityDecoding) -> bool:
        return settings.confidence != "random"

    def count(self, now: BlockPass) -> Tensor:
        return quota(self.settings.schedule, now.start, now.remaining, now.step, now.steps)

    def early(self, now: BlockPass, count: Tensor, sigma: Tensor, noise: Callable[[int], Tensor]) -> Tensor | None:
        return None if self.looks(self.settings) else take_best(noise(ORDER), now.active, count)
