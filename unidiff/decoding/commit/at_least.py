"""`at_least`: a quota in every pass, or everything above a threshold where that is more (LLaDA2.0, inclusionAI 2025)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from unidiff.decoding.commit.base import BlockPass, NamedRule, take_best
from unidiff.decoding.config import ModalityDecoding


class AtLeast(NamedRule):
    """Every position with a confidence above `threshold`, where these are as many as the quota; else the surest ones, as many
    as the quota says: `least_tokens`, or of a block in `block_steps` passes block_length // block_steps, plus one in the
    first block_length % block_steps.
    """

    name = "at_least"
    has_threshold = True

    @classmethod
    def check(cls, settings: ModalityDecoding) -> None:
        super().check(settings)
        if settings.block_steps is not None and settings.block_length is None:
            raise ValueError(
                f"block_steps is {settings.block_steps}, but there are no blocks; set block_length, or least_tokens"
            )

    @classmethod
    def in_steps(cls, settings: ModalityDecoding, steps: int, schedule: str) -> ModalityDecoding:
        """So many passes of a block at most, where the settings count these."""
        if settings.block_steps is None:
            return super().in_steps(settings, steps, schedule)
        return replace(settings, block_steps=steps)

    def count(self, now: BlockPass) -> Tensor:
        own = self.settings
        quota = torch.full_like(now.remaining, own.least_tokens)
        if own.block_steps is not None and own.block_length is not None:
            steps = min(own.block_steps, own.block_length)
            quota = own.block_length // steps + (now.step < own.block_length % steps).long()
        return torch.minimum(quota, now.remaining)

    def pick(self, confidence: Tensor, score: Tensor, is_real: Tensor, count: Tensor, index: Tensor) -> Tensor:
        sure = is_real & (confidence > self.settings.threshold)
        enough = (sure.sum(1) >= count) & (count > 0)
        return torch.where(enough[:, None], sure, take_best(score, is_real, count, self.ranking_slack))
