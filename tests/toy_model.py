"""Tabular denoisers: models whose every answer is known, for exact tests of the sampler."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from fractions import Fraction

import torch
from torch import Tensor

from unidiff.tokens import Span, TokenBatch, Vocabulary


class TableModel:
    """One distribution per position for every partly masked string; a `Denoiser`.

    `log_table` is float64 `[(V + 1)^L, L, V]`, indexed by the ids read as a number in base V + 1 ([MASK] = V).
    """

    def __init__(self, log_table: Tensor) -> None:
        self.log_table = log_table
        self.length, self.size = log_table.shape[1:]
        self.vocabulary = Vocabulary(self.size + 1, (0, self.size), (self.size + 1, self.size + 1), self.size)
        self.calls = 0
        self._powers = (self.size + 1) ** torch.arange(self.length - 1, -1, -1)

    def hidden(
        self, ids: Tensor, modality: Tensor, positions: Tensor, attention_mask: Tensor | None, time=None
    ) -> Tensor:
        self.calls += 1
        return self.log_table[(ids[:, : self.length] * self._powers).sum(1)]

    def head(self, hidden: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        return hidden[..., start:stop]

    def request(self, rows: int) -> TokenBatch:
        """Rows of L masked tokens."""
        one = TokenBatch.from_spans([[Span.masked_text(self.length, self.vocabulary)]])
        return one.rows([0] * rows)

    def index_of(self, ids: Tensor) -> Tensor:
        """int64 `[B]`, complete strings as numbers in base V."""
        return (ids * self.size ** torch.arange(self.length - 1, -1, -1)).sum(1)

    @classmethod
    def from_denoiser(cls, denoiser: Mapping[str, list], size: int) -> TableModel:
        """From the golden form: "0M1" -> per position a list of fractions, or null at known ones."""
        length = len(next(iter(denoiser)))
        table = torch.full(((size + 1) ** length, length, size), -torch.inf, dtype=torch.float64)
        for state, rows in denoiser.items():
            index = 0
            for symbol in state:
                index = index * (size + 1) + (size if symbol == "M" else int(symbol))
            for place, row in enumerate(rows):
                if row is not None:
                    table[index, place] = torch.tensor([float(Fraction(p)) for p in row], dtype=torch.float64).log()
        return cls(table)

    @classmethod
    def from_joint(cls, joint: Tensor) -> TableModel:
        """The exact denoiser of a joint `[V, ..., V]`: every answer is a conditional of it."""
        length, size = joint.ndim, joint.shape[0]
        table = torch.full(((size + 1) ** length, length, size), -torch.inf, dtype=torch.float64)
        for index, state in enumerate(itertools.product(range(size + 1), repeat=length)):
            seen = tuple(slice(None) if s == size else slice(s, s + 1) for s in state)
            part = joint[seen]
            for place, symbol in enumerate(state):
                if symbol == size and part.sum() > 0:
                    marginal = part.sum([d for d in range(length) if d != place])
                    table[index, place] = (marginal / marginal.sum()).log()
        return cls(table)


def joint_tensor(probabilities: Mapping[str, str], size: int) -> Tensor:
    """ "021" -> "1/7" to a dense float64 joint `[V, ..., V]`."""
    length = len(next(iter(probabilities)))
    joint = torch.zeros((size,) * length, dtype=torch.float64)
    for symbols, p in probabilities.items():
        joint[tuple(int(s) for s in symbols)] = float(Fraction(p))
    return joint
