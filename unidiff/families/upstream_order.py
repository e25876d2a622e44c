"""The order in which MMaDA's program commits the codes of a picture, with its defects, for `compat`; Dynin-Omni has it from there.

How many codes stay masked is a share of all codes, known ones included, rounded in float32; at least one does until the last
pass; and the noise on the ranking falls again and again.
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
from unidiff.families.layout import DecodeRequest, Prepared
from unidiff.tokens import Modality


def in_upstream_order(ready: Prepared, request: DecodeRequest) -> Prepared:
    """The same decode in the order of the program, where a picture alone is decoded by counts."""
    config = ready.config
    if not request.drawn or config.image.rule != "quota":
        return ready
    timed = replace(config, image=replace(config.image, rule="timed"))
    return ready._replace(config=timed, rules={Modality.IMAGE: UpstreamOrder(request.picture.sum(1))})


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
