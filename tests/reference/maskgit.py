"""The scheduler of Muddit, Meissonic and aMUSEd as it is, defects included: draw everywhere, hide the least sure again.

MaskGIT: Chang et al. 2022, arXiv 2202.04200. At step k of N every hidden position gets a draw from softmax(logits);
then the m positions of a row with the lowest log p + tau_k Gumbel are hidden again, with
m = max(1, min(hidden - 1, floor(L r_k))) and r_k = cos(pi/2 (k + 1)/N) or 1 - (k + 1)/N; the last step hides none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LAST_TEMPERATURE = 0.01  # where a single temperature runs to
_TINY = 1e-20


class GeneratorDraws:
    """The reference's stream: per step one multinomial over all positions of the batch, then one uniform each."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def tokens(self, probabilities: Tensor, step: int) -> Tensor:
        """One category per position: `[B, L, C]` to int64 `[B, L]`."""
        drawn = torch.multinomial(probabilities.flatten(0, 1), 1, generator=self._generator)
        return drawn.view(probabilities.shape[:2])

    def uniform(self, rows: int, length: int) -> Tensor:
        """float32 `[rows, length]`; asked for after `tokens`, and not in the last step."""
        return torch.zeros(rows, length).uniform_(0, 1, generator=self._generator)

    def gumbel(self, like: Tensor, step: int) -> Tensor:
        """Standard Gumbel noise of the shape `[B, L]`."""
        return -torch.log((-torch.log(self.uniform(*like.shape).clamp(_TINY))).clamp(_TINY))


@dataclass(frozen=True)
class MaskGitStep:
    """Outcome of a step. All `[B, L]` except `count`.

    Attributes:
        tokens: the next state; hidden positions hold the mask id.
        x0: the state with every hidden position filled.
        sampled: the draw at every position, before known tokens are put back.
        probability: of the draw; the largest number of the dtype at known positions.
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

    With tau > 0 a row with nothing hidden gives up a known token at every step.

    Args:
        steps: N.
        temperature: tau from the first to the last step, linearly; a single number runs to 0.01.
        masking: "cosine" or "linear".
    """

    steps: int
    temperature: float | Sequence[float] = (2.0, 0.0)
    masking: str = "cosine"

    def temperatures(self) -> Tensor:
        """tau_k, float32 `[N]`."""
        ends = [self.temperature] if isinstance(self.temperature, int | float) else list(self.temperature)
        return torch.linspace(float(ends[0]), float((*ends, LAST_TEMPERATURE)[1]), self.steps)

    def ratios(self) -> Tensor:
        """r_k, float32 `[N]`: the share of positions still hidden after step k."""
        done = torch.arange(1, self.steps + 1) / self.steps
        return torch.cos(done * math.pi / 2) if self.masking == "cosine" else 1 - done

    def planned(self, length: int, starting_ratio: float = 1.0) -> Tensor:
        """floor(L start r_k), float32 `[N]`; rounding makes the last one -1."""
        return (length * (starting_ratio * self.ratios())).floor()

    def step(
        self,
        logits: Tensor,
        tokens: Tensor,
        mask_id: int,
        step: int,
        draws: GeneratorDraws,
        starting_ratio: float = 1.0,
    ) -> MaskGitStep:
        """One reverse step.

        Args:
            logits: `[B, L, C]`; category c is token id c.
            tokens: int64 `[B, L]`, `mask_id` where hidden.
            starting_ratio: share of positions hidden at the start, of the whole batch.
        """
        hidden, p = tokens == mask_id, logits.softmax(-1)
        sampled = draws.tokens(p, step)  # [B, L]
        x0 = torch.where(hidden, sampled, tokens)
        known = torch.finfo(p.dtype).max
        probability = torch.where(hidden, p.gather(-1, sampled[..., None])[..., 0], known)
        if step == self.steps - 1:
            return MaskGitStep(x0, x0, sampled, probability, torch.zeros(len(x0), 1), torch.zeros_like(hidden))
        unknown = hidden.sum(1, keepdim=True)  # [B, 1]
        count = torch.minimum(unknown - 1, self.planned(tokens.shape[1], starting_ratio)[step]).clamp_min(1)
        confidence = torch.log(probability.clamp(_TINY)) + self.temperatures()[step] * draws.gumbel(probability, step)
        again = confidence < confidence.sort(dim=-1).values.gather(1, count.long())
        return MaskGitStep(torch.where(again, mask_id, x0), x0, sampled, probability, count, again)

    def add_noise(self, tokens: Tensor, step: int, mask_id: int, u: Tensor) -> Tensor:
        """The state that step k leaves behind on average: tokens hidden where the uniform `u` `[B, ...]` is below r_k."""
        return torch.where(u < self.ratios()[step], mask_id, tokens)
