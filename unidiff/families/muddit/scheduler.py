"""The commit rule of MaskGIT as Muddit, Meissonic and aMUSEd run it: draw everywhere, hide the least sure again.

MaskGIT: Chang et al. 2022, arXiv 2202.04200. At step k of N every hidden position gets a draw from softmax(logits);
then the m positions of a row with the lowest log p + tau_k Gumbel are hidden again, with
m = max(1, min(hidden - 1, floor(L r_k))) and r_k = cos(pi/2 (k + 1)/N) or 1 - (k + 1)/N; the last step hides none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from unidiff.decoding.draw import CHOICE, TOKEN, RowNoise, gumbel, inverse_cdf
from unidiff.diffusion.schedules import get_schedule
from unidiff.schema import check_fields

MASKING_SCHEDULES = ("cosine", "linear")
LAST_TEMPERATURE = 0.01  # where a single temperature runs to
HOTTEST = 1e30  # more would be infinite in float32
_TINY = 1e-20


class Draws(Protocol):
    """Where the randomness of a step comes from."""

    def tokens(self, probabilities: Tensor, step: int) -> Tensor:
        """One category per position: `[B, L, C]` to int64 `[B, L]`."""
        ...

    def gumbel(self, like: Tensor, step: int) -> Tensor:
        """Standard Gumbel noise of the shape `[B, L]`; asked for after `tokens`, and not in the last step."""
        ...


class RowDraws:
    """Noise that depends on a row's seed, the step and the position only, never on the batch.

    Args:
        seeds: int64 `[B]`.
        length: L, positions per row.
    """

    def __init__(self, seeds: Tensor, length: int) -> None:
        self._noise = RowNoise(seeds, torch.ones(len(seeds), length, dtype=torch.bool, device=seeds.device))

    def tokens(self, probabilities: Tensor, step: int) -> Tensor:
        return inverse_cdf(probabilities, self._noise(step, TOKEN).to(probabilities.device))

    def gumbel(self, like: Tensor, step: int) -> Tensor:
        return gumbel(self._noise(step, CHOICE)).to(like.device)


class GeneratorDraws:
    """The reference's stream: per step one multinomial over all positions of the batch, then one uniform each."""

    def __init__(self, generator: torch.Generator | None = None) -> None:
        self._generator = generator

    def tokens(self, probabilities: Tensor, step: int) -> Tensor:
        p = probabilities if self._generator is None else probabilities.to(self._generator.device)
        p = p.float() if p.device.type == "cpu" else p  # CPU half precision has no multinomial
        drawn = torch.multinomial(p.flatten(0, 1), 1, generator=self._generator)
        return drawn.view(p.shape[:2]).to(probabilities.device)

    def gumbel(self, like: Tensor, step: int) -> Tensor:
        device = like.device if self._generator is None else self._generator.device
        u = torch.zeros_like(like, device=device).uniform_(0, 1, generator=self._generator).to(like.device)
        return -torch.log((-torch.log(u.clamp(_TINY))).clamp(_TINY))


@dataclass(frozen=True)
class MaskGitStep:
    """Outcome of a step. All `[B, L]` except `count`.

    Attributes:
        tokens: the next state; hidden positions hold the mask id.
        x0: the state with every hidden position filled.
        sampled: the draw at every position, before known tokens are put back.
        probability: of the draw; +inf at known positions (the largest number of the dtype in compat mode).
        count: float32 `[B, 1]`, how many positions were to be hidden again; 0 in the last step.
        hidden: bool, those positions.
    """

    tokens: Tensor
    x0: Tensor
    sampled: Tensor
    probability: Tensor
    count: Tensor
    hidden: Tensor


@dataclass(frozen=True)
class MaskGitSchedule:
    """How many positions stay hidden after each step, and how random the order is.

    Args:
        steps: N.
        temperature: tau from the first to the last step, linearly; a single number runs to 0.01.
        masking: "cosine" or "linear".
        compat: reproduce the reference's defects: with tau > 0 a row with nothing hidden gives up a known token at
            every step; arithmetic in the logits' own precision, in which noise can outweigh a known token; fewer
            positions hidden than planned where confidences tie.
    """

    steps: int
    temperature: float | Sequence[float] = (2.0, 0.0)
    masking: str = "cosine"
    compat: bool = False

    def __post_init__(self) -> None:
        check_fields(self, "")
        if self.steps < 1:
            raise ValueError(f"steps = {self.steps}; expected at least 1")
        if self.masking not in MASKING_SCHEDULES:
            raise ValueError(f"masking = {self.masking!r:.80}; expected one of {list(MASKING_SCHEDULES)}")
        ends = [self.temperature] if isinstance(self.temperature, int | float) else list(self.temperature)
        if not 1 <= len(ends) <= 2 or not all(0 <= t <= HOTTEST for t in ends):
            raise ValueError(
                f"temperature = {self.temperature!r:.80}; expected a number or a pair of numbers from 0 to {HOTTEST:g}"
            )

    def temperatures(self) -> Tensor:
        """tau_k, float32 `[N]`."""
        ends = [self.temperature] if isinstance(self.temperature, int | float) else list(self.temperature)
        return torch.linspace(float(ends[0]), float((*ends, LAST_TEMPERATURE)[1]), self.steps)

    def ratios(self) -> Tensor:
        """r_k, float32 `[N]`: the share of positions still hidden after step k."""
        done = torch.arange(1, self.steps + 1) / self.steps
        return get_schedule(self.masking).rate_after(done)

    def planned(self, length: int, starting_ratio: Tensor | float = 1.0) -> Tensor:
        """floor(L start r_k), float32 `[..., N]` for a `starting_ratio` of `[..., 1]`; rounding makes the last one -1."""
        return (length * (starting_ratio * self.ratios())).floor()

    def counts(self, step: int, hidden: Tensor, length: int, starting_ratio: Tensor | float = 1.0) -> Tensor:
        """m of every row after `step`, float32 `[B, 1]`; 0 where a row has nothing hidden (1 in compat mode).

        Args:
            step: k in [0, N - 1).
            hidden: bool `[B, L]`, before the step.
            length: L.
            starting_ratio: share of positions hidden at the start, float or `[B]`: scales r_k.
        """
        start = torch.as_tensor(starting_ratio, dtype=torch.float32).cpu().reshape(-1, 1)
        unknown = hidden.sum(1, keepdim=True)  # [B, 1]
        planned = self.planned(length, start)[:, step : step + 1].to(hidden.device)  # [B or 1, 1]
        count = torch.minimum(unknown - 1, planned).clamp_min(1)
        return count if self.compat else torch.where(unknown > 0, count, 0.0)

    def step(
        self,
        logits: Tensor,
        tokens: Tensor,
        mask_id: int,
        step: int,
        draws: Draws,
        starting_ratio: Tensor | float = 1.0,
    ) -> MaskGitStep:
        """One reverse step.

        Args:
            logits: `[B, L, C]`; category c is token id c.
            tokens: int64 `[B, L]`, `mask_id` where hidden; known tokens never change.
            mask_id: the hidden token.
            step: k in [0, N).
            draws: the randomness.
            starting_ratio: as in `counts`.
        """
        if not 0 <= step < self.steps:
            raise ValueError(f"step {step} is not one of {self.steps} steps, counted from 0")
        hidden = tokens == mask_id
        logits = logits if self.compat or logits.dtype == torch.float64 else logits.float()
        p = logits.softmax(-1)
        sampled = draws.tokens(p, step)  # [B, L]
        x0 = torch.where(hidden, sampled, tokens)
        known = torch.finfo(p.dtype).max if self.compat else math.inf
        probability = torch.where(hidden, p.gather(-1, sampled[..., None])[..., 0], known)
        if step == self.steps - 1:
            return MaskGitStep(x0, x0, sampled, probability, torch.zeros(len(x0), 1), torch.zeros_like(hidden))
        count = self.counts(step, hidden, tokens.shape[1], starting_ratio)
        tau = self.temperatures()[step : step + 1].to(p.device)
        noise = tau * draws.gumbel(probability, step)
        again = (self._below_cut if self.compat else _lowest)(torch.log(probability.clamp(_TINY)) + noise, count)
        return MaskGitStep(torch.where(again, mask_id, x0), x0, sampled, probability, count, again)

    @staticmethod
    def _below_cut(confidence: Tensor, count: Tensor) -> Tensor:
        cut = confidence.sort(dim=-1).values.gather(1, count.long())  # [B, 1]
        return confidence < cut

    def add_noise(self, tokens: Tensor, step: int, mask_id: int, u: Tensor) -> Tensor:
        """The state that step k leaves behind on average: tokens hidden where the uniform `u` `[B, ...]` is below r_k."""
        return torch.where(u < self.ratios()[step].to(u.device), mask_id, tokens)


def _lowest(confidence: Tensor, count: Tensor) -> Tensor:
    """bool `[B, L]`, exactly the `count` `[B, 1]` lowest of each row; ties go to the first."""
    rank = confidence.argsort(dim=-1, stable=True).argsort(dim=-1)
    return rank < count


def starting_ratio(hidden: Tensor, compat: bool = False) -> Tensor:
    """Share of hidden positions, float32 `[B]`: of each row, or (compat) of the whole batch for every row.

    Args:
        hidden: bool `[B, ...]` before the first step.
        compat: the reference averages over the batch, so that a row's result depends on its neighbours.
    """
    share = hidden.flatten(1).float().mean(1)
    return share.mean().expand_as(share) if compat else share
