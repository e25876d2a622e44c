"""MaskGIT's commit rule (Chang et al. 2022, arXiv 2202.04200) where Muddit's decode is not the sampler's plain quota.

With N steps, the positions of step k that stay hidden are those of the lowest log p + tau_k Gumbel, as many as the schedule
says. That is the sampler's `quota`; here are a decode that begins in the middle (image to image), and the reference program.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from unidiff.decoding.commit.base import take_best
from unidiff.diffusion.schedules import get_schedule


@dataclass
class MaskGit:
    """A `CommitRule` for one request: it counts the passes that it is asked in.

    Args:
        steps: N. first: the step of the first pass; as much is hidden then as the steps before it leave.
        schedule: name of the share that is still hidden.
        upstream: None, or how many positions each row has, known ones included: the defects of the reference (Muddit,
            Meissonic, aMUSEd). Counts are rounded in float32 and are shares of all positions: of text, or of images times
            the share that is hidden at the start, which is the mean over the batch. At least one position stays hidden
            until the last step, and fewer than planned where confidences tie. tau_k is 0 in the last step, not behind it.
        text: of `upstream`, whether the positions are text.
        temperature: tau of the first step, with `upstream`; that of the settings.
    """

    steps: int
    first: int = 0
    schedule: str = "cosine"
    upstream: int | None = None
    text: bool = False
    temperature: float = 2.0
    _made: int = field(default=0, init=False)
    _start: Tensor | None = field(default=None, init=False)

    def __call__(self, confidence: Tensor, score: Tensor, is_real: Tensor, count: Tensor, index: Tensor) -> Tensor:
        """See `CommitRule`."""
        hidden, step = is_real.sum(1), self.first + self._made
        self._made += 1
        start = self._start = hidden if self._start is None else self._start
        if step + 1 >= self.steps:
            return is_real
        if self.upstream is not None:
            return self._reference(confidence, score, is_real, start, step)
        share, begin = (self._share(done, torch.float64) for done in (step + 1, self.first))
        keep = torch.minimum((start * share / begin + 1e-9).floor().long(), hidden - 1)
        return take_best(score, is_real, hidden - keep)

    def _share(self, done: int, dtype: torch.dtype) -> Tensor:
        return get_schedule(self.schedule).masked_share(torch.tensor(done / self.steps, dtype=dtype))

    def _reference(self, confidence: Tensor, score: Tensor, is_real: Tensor, start: Tensor, step: int) -> Tensor:
        assert self.upstream is not None
        begin = self._share(self.first, torch.float32)
        ratio = torch.ones(()) if self.text else (start / self.upstream).mean() / begin.to(start.device)
        share = self._share(step + 1, torch.float32).to(ratio.device)
        planned = (self.upstream * (ratio * share)).floor().long().to(start.device)
        keep = torch.minimum(is_real.sum(1) - 1, planned).clamp_min(1)[:, None]  # [B, 1]
        certain = confidence.log()
        here, theirs = (
            1 - step / self.steps,
            1 - step / (self.steps - 1),
        )  # the settings' noise falls to 0 behind the last
        value = certain + (score - certain) * (theirs / here) if self.temperature else certain
        value = torch.where(is_real, value, torch.inf)
        cut = value.sort(dim=1).values.gather(1, keep.clamp_max(value.shape[1] - 1))
        return is_real & ~(value < cut)
