"""Exact NELBOs by visiting all 2^n masks of n targets: the ground truth that estimators are tested against."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from reference.nelbo import block_batches
from unidiff.diffusion.likelihood import Scorer
from unidiff.diffusion.noise import NoisyBatch
from unidiff.tokens import TokenBatch, Vocabulary

_LIMIT = 16


@dataclass(frozen=True)
class MaskMoments:
    """Sums over all masks with k of n targets hidden, k = 0..n; S is the summed NLL of the hidden targets.

    Attributes:
        first: float64 `[B, n + 1]`, sum of S.
        second: float64 `[B, n + 1]`, sum of S squared.
    """

    first: Tensor
    second: Tensor

    @property
    def n(self) -> int:
        return self.first.shape[1] - 1

    def expected_sum(self, alpha: Tensor | float, power: int = 1) -> Tensor:
        """E[S^power] at visibility alpha: `[B]` for a number, `[B, *alpha.shape]` for a tensor."""
        alpha = torch.as_tensor(alpha, dtype=torch.float64)[..., None]
        k = torch.arange(self.n + 1, dtype=torch.float64)
        chance = alpha ** (self.n - k) * (1 - alpha) ** k  # [..., n + 1]
        moment = self.first if power == 1 else self.second
        return torch.einsum("bk,...k->b...", moment, chance)

    def coefficients(self) -> Tensor:
        """float64 `[B, n]`: g(alpha) = E[S] / (1 - alpha) as a polynomial in alpha, constant first."""
        out = torch.zeros(len(self.first), self.n, dtype=torch.float64)
        for k in range(1, self.n + 1):
            for j in range(k):  # alpha^(n-k) (1 - alpha)^(k-1)
                out[:, self.n - k + j] += self.first[:, k] * math.comb(k - 1, j) * (-1) ** j
        return out

    def nelbo(self) -> Tensor:
        """float64 `[B]`: int_0^1 g = sum over k of (1/k) times the mean of S over the masks of size k."""
        return sum((self.first[:, k] / (k * math.comb(self.n, k)) for k in range(1, self.n + 1)), torch.zeros(()))

    def discrete_nelbo(self, steps: int) -> Tensor:
        """float64 `[B]`: T-step NELBO, alpha = 1 - t: sum of (alpha_s - alpha_t)/(1 - alpha_t) E[S] over t = k/T."""
        t = torch.arange(1, steps + 1, dtype=torch.float64) / steps
        return (self.expected_sum(1 - t) / (steps * t)).sum(1)

    def mask_count_variance(self) -> Tensor:
        """float64 `[B]`: one-draw variance of (n/k) S with k uniform on 1..n."""
        terms = (self.second[:, k] * self.n / (k * k * math.comb(self.n, k)) for k in range(1, self.n + 1))
        return sum(terms, torch.zeros(())) - self.nelbo().square()


def mask_moments(score: Scorer, batch: TokenBatch, vocabulary: Vocabulary) -> MaskMoments:
    """Visit every mask. All rows must have the same target positions.

    Raises:
        ValueError: rows differ in their targets, or there are more than 16.
    """
    n = len(_columns(batch))
    first = torch.zeros(len(batch.ids), n + 1, dtype=torch.float64)
    second = torch.zeros_like(first)
    for where in all_masks(batch):
        noisy = NoisyBatch(batch.hide(where, vocabulary), where)
        total = score(noisy.batch, batch, where).double().sum(1)
        first[:, int(where[0].sum())] += total
        second[:, int(where[0].sum())] += total.square()
    return MaskMoments(first, second)


def leave_one_out_sums(score: Scorer, batch: TokenBatch, vocabulary: Vocabulary) -> Tensor:
    """float64 `[B, n + 1]`: over masks with k hidden, the summed NLL of each visible target hidden in its turn."""
    columns = _columns(batch)
    out = torch.zeros(len(batch.ids), len(columns) + 1, dtype=torch.float64)
    for where in all_masks(batch):
        for column in columns:
            if bool(where[0, column]):
                continue
            one = torch.zeros_like(where)
            one[:, column] = True
            x_t = batch.hide(where | one, vocabulary)
            out[:, int(where[0].sum())] += score(x_t, batch, one).double().sum(1)
    return out


def exact_block_nelbo(score: Scorer, batch: TokenBatch, blocks: Tensor, vocabulary: Vocabulary) -> Tensor:
    """float64 `[B]`: block-diffusion NELBO. With one position per block: the NLL of that generation order."""
    parts = [mask_moments(score, part, vocabulary).nelbo() for part in block_batches(batch, blocks, vocabulary)]
    return torch.stack(parts).sum(0)


def all_masks(batch: TokenBatch) -> Iterator[Tensor]:
    """Every subset of the target columns, as bool `[B, L]`."""
    columns = _columns(batch)
    for bits in range(1 << len(columns)):
        where = torch.zeros(batch.shape, dtype=torch.bool)
        where[:, [c for i, c in enumerate(columns) if bits >> i & 1]] = True
        yield where


def _columns(batch: TokenBatch) -> list[int]:
    targets = batch.targets
    if not bool((targets == targets[:1]).all()):
        raise ValueError("exact enumeration needs the same target positions in every row; score unlike rows apart")
    columns = targets[0].nonzero()[:, 0].tolist()
    if len(columns) > _LIMIT:
        raise ValueError(f"exact enumeration of {len(columns)} targets needs 2^{len(columns)} passes; at most {_LIMIT}")
    return columns
