"""`timed`: a quota by a clock, to which words and picture can keep together (MMaDA-Parallel, arXiv 2511.09611)."""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor

from unidiff.decoding.commit.base import BlockPass, Quota
from unidiff.decoding.config import ModalityDecoding
from unidiff.diffusion.schedules import get_schedule


class Timed(Quota):
    """The surest positions, as many as `schedule` leaves at the time (step + 1) / `steps`; the last pass takes all.

    The clock runs on in passes that fill nothing, and the model is not asked in them. So a modality can have fewer tokens than
    `steps`, and with `own_passes` fill some in these passes only: at least one in each, and at least one is left for the last.
    """

    name = "timed"
    capped = foretold = False

    def __init__(self, settings: ModalityDecoding, targets: Tensor) -> None:
        super().__init__(settings, targets)
        self._own, self._last = None, settings.steps
        if settings.own_passes is not None:
            own = own_passes(settings)
            self._own, self._last = own.to(targets.device), 1 + int(own.nonzero().amax())  # bool [S]

    @classmethod
    def check(cls, settings: ModalityDecoding) -> None:
        super().check(settings)
        if settings.block_length is not None and settings.own_passes is not None:
            raise ValueError(
                f"block_length is {settings.block_length} and own_passes {settings.own_passes}, which are of all tokens at "
                "once; leave one of them out"
            )

    @classmethod
    def passes_of_a_block(cls, settings: ModalityDecoding, size: int, block: int) -> int | Fraction:
        steps = settings.steps if settings.own_passes is None else int(own_passes(settings).sum())
        return Fraction(min(steps, size) * block, size)

    def count(self, now: BlockPass) -> Tensor:
        steps = now.steps.clamp_max(self._last)
        count = torch.where(now.step + 1 >= steps, now.remaining, now.remaining - self.kept(now))
        if self._own is not None:
            count = torch.where(self.own_now(now.step) | (now.step >= steps), count, 0)
        return count.clamp_min(0)

    def own_now(self, step: Tensor) -> Tensor:
        """bool `[B]`: rows of which something is filled in this pass of the clock."""
        if self._own is None:
            return torch.ones_like(step, dtype=torch.bool)
        return self._own[step.clamp_max(len(self._own) - 1)]

    def kept(self, now: BlockPass) -> Tensor:
        """int64 `[B]`: how many positions stay masked in a pass that is not the last."""
        planned = self.planned_rest(now)
        return planned if self._own is None else torch.minimum(planned, now.remaining - 1).clamp_min(1)

    def planned_rest(self, now: BlockPass) -> Tensor:
        """int64 `[B]`: how many the schedule leaves after the pass."""
        done, steps = now.step + 1, now.steps.clamp_min(1)
        if self.settings.schedule == "fixed":
            return now.start - done * (now.start // steps) - torch.minimum(done, now.start % steps)
        left = get_schedule(self.settings.schedule).rate_after((done.double() / steps).clamp_max(1))
        return (now.start * left + 1e-9).floor().long()

    def early(self, now: BlockPass, count: Tensor, noise: object) -> None:
        return None  # also random positions are picked among those that were looked at

    def looked_at(self, candidates: Tensor, count: Tensor) -> Tensor:
        return candidates & (count > 0)[:, None]

    def rank(self, confidence: Tensor, time: Tensor, u: Tensor) -> Tensor:
        behind = (time - 1 / self.settings.steps).clamp_min(0)  # the pass
        return super().rank(confidence, behind, u)


def own_passes(settings: ModalityDecoding) -> Tensor:
    """bool `[steps]`, the passes of the clock in which a modality is decoded: round(linspace(floor(`first_pass` S), S - 1,
    `own_passes`)) of S `steps`, halves to even."""
    assert settings.own_passes is not None
    steps = settings.steps
    first = min(int(settings.first_pass * steps), steps - 1)
    places = torch.linspace(first, steps - 1, settings.own_passes).round().long()
    return torch.zeros(steps, dtype=torch.bool).index_fill(0, places, True)
