"""Defects of Dynin-Omni's program, which come back with `DyninLayout(compat="upstream")`.

The first ids of an unconditional row, as many as a number that was meant for longer prompts, come from the prompt without words
as it was at the start; all others come from the conditional row in every pass. Of pictures, the first codes stay masked in it
for good. Of edits, both rows have the same ids, words included, and differ in what is visible alone.

Codes are committed by the counts and the noise of MMaDA's program: how many stay masked is a share of all codes, known ones
included, rounded in float32; at least one does until the last pass; and the noise on the ranking falls again and again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from unidiff.decoding.commit.base import BlockPass, NamedRule
from unidiff.decoding.commit.timed import Timed
from unidiff.decoding.config import ModalityDecoding
from unidiff.decoding.draw import ranking
from unidiff.diffusion.schedules import get_schedule
from unidiff.families.layout import DecodeRequest


def with_prefix(request: DecodeRequest, cut: int) -> DecodeRequest:
    """A request whose unconditional rows have the ids of the conditional ones from position `cut` on. What is hidden before it
    stays so; which positions exist does not change."""
    batch, (away,) = request.batch, request.unconditional
    early = (torch.arange(batch.shape[1], device=batch.ids.device) < cut).expand(batch.shape)
    away = away.replace(ids=torch.where(early, away.ids, batch.ids), given=away.given | early)
    return replace(request, unconditional=(away,))


@dataclass(frozen=True)
class UpstreamOrder:
    """Makes the rule of codes (`RuleMaker`); positions: int64 `[B]`, codes of the picture, known ones too."""

    positions: Tensor

    def start(self, settings: ModalityDecoding, targets: Tensor) -> NamedRule:
        """See `RuleMaker`."""
        return UpstreamQuota(settings, targets, self.positions)


class UpstreamQuota(Timed):
    """`timed` by the counts of the program. The noise of pass s of S has the temperature T times the product of 1 - (k + 1) / S
    over all k from 0 to s.
    """

    def __init__(self, settings: ModalityDecoding, targets: Tensor, positions: Tensor) -> None:
        super().__init__(settings, targets)
        self.positions, self.step = positions.to(targets.device), torch.zeros_like(positions)

    def count(self, now: BlockPass) -> Tensor:
        self.step = now.step
        done = ((now.step + 1).double() / self.settings.steps).float()
        share = get_schedule(self.settings.schedule).masked_share(done.double()).float()
        keep = torch.minimum(now.remaining - 1, (self.positions * share).floor().long()).clamp_min(1)
        return torch.where(now.step + 1 >= now.steps, now.remaining, now.remaining - keep).clamp_min(0)

    def rank(self, confidence: Tensor, time: Tensor, u: Tensor) -> Tensor:
        return ranking(confidence.clamp_min(1e-20), self.settings, self.temperature, u)

    @property
    def temperature(self) -> Tensor:
        """float64 `[B]`: that of the pass, of a start at 1."""
        steps = self.settings.steps
        left = 1 - torch.arange(1, steps + 1, device=self.step.device).double() / steps
        return left.cumprod(0)[self.step.clamp_max(steps - 1)]
