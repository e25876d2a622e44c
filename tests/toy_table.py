"""The exact toy examples (golden set `toy_exact`) as callables: a table of conditional distributions acts as the model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor

from unidiff.tokens import Span, TokenBatch, Vocabulary


@dataclass(frozen=True)
class ToyExample:
    """One `toy_exact.json`: V tokens `0..V-1` are text ids, [MASK] is V."""

    data: dict
    vocabulary: Vocabulary
    strings: list[str]
    probabilities: Tensor  # float64 [number of strings]

    @classmethod
    def load(cls, path: Path) -> ToyExample:
        data = json.loads(path.read_text())
        joint = {s: Fraction(p) for s, p in data["joint"].items()}
        probabilities = torch.tensor([float(p) for p in joint.values()], dtype=torch.float64)
        return cls(data, Vocabulary.unified(data["V"], 0), list(joint), probabilities)

    def ids(self, string: str) -> list[int]:
        mask = self.data["mask_symbol"]
        return [self.vocabulary.mask_id if c == mask else int(c) for c in string]

    def batch(self, strings: list[str]) -> TokenBatch:
        return TokenBatch.from_spans([[Span.text(self.ids(s))] for s in strings])

    def log_probs(self, denoiser: str):
        """`x_t -> float64 [B, L, V + 1]` log-probabilities; a known position is a point mass on its token."""
        table = {}
        for state, rows in self.data["denoisers"][denoiser].items():
            out = torch.zeros(len(state), self.vocabulary.size, dtype=torch.float64)
            for i, row in enumerate(rows):
                if row is not None:
                    out[i, : len(row)] = torch.tensor([float(Fraction(p)) for p in row], dtype=torch.float64)
            table[tuple(self.ids(state))] = out
        blank = torch.zeros(self.data["L"], self.vocabulary.size, dtype=torch.float64)

        def lookup(x_t: TokenBatch) -> Tensor:
            probs = torch.stack([table.get(tuple(row), blank) for row in x_t.ids.tolist()])
            known = torch.nn.functional.one_hot(x_t.ids, self.vocabulary.size).double()
            return torch.where((x_t.ids == self.vocabulary.mask_id)[..., None], probs, known).log()

        return lookup
