"""Credit: the recurrence of dInfer, position by position, whatever the index looks like."""

from __future__ import annotations

import math

import pytest
import torch

from unidiff.decoding.commit.credit import Credit
from unidiff.decoding.config import ModalityDecoding

SETTINGS = ModalityDecoding(rule="credit", credit_decay=0.8, credit_power=0.2, credit_weight=0.7)


def test_credit_follows_the_formula() -> None:
    """Passes that look at different positions; C <- 0.8 C, C[best] += p^0.2, logits + 0.7 log(1 + C)."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.tensor([[False, True, True, False, True], [True, False, False, True, False]])
    credit = Credit(SETTINGS, targets)
    earned = {(row, place): [0.0] * 4 for row, place in targets.nonzero().tolist()}
    for index, is_real in (
        ([[1, 2, 4], [0, 3, 1]], [[True, True, True], [True, True, False]]),
        ([[2, 4, 0], [3, 0, 1]], [[True, True, False], [True, False, False]]),
        ([[1, 2, 4], [0, 3, 1]], [[True, True, True], [True, True, False]]),
    ):
        logits = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
        out = credit.adjust(logits, torch.tensor(index), torch.tensor(is_real))
        for row in range(2):
            for column in range(3):
                if not is_real[row][column]:
                    continue
                own = earned[row, index[row][column]]
                p = logits[row, column].softmax(-1).tolist()
                own[:] = [0.8 * c for c in own]
                own[p.index(max(p))] += max(p) ** 0.2
                expected = [
                    value + 0.7 * math.log(1 + c) for value, c in zip(logits[row, column].tolist(), own, strict=True)
                ]
                assert out[row, column].tolist() == pytest.approx(expected, abs=1e-12)


def test_remasked_positions_start_from_nothing_and_forbidden_tokens_stay_forbidden() -> None:
    targets = torch.tensor([[True, True]])
    index, is_real = torch.tensor([[0, 1]]), torch.tensor([[True, True]])
    logits = torch.tensor([[[1.0, -math.inf, 0.0], [0.0, -math.inf, 2.0]]])
    credit = Credit(SETTINGS, targets)
    credit.forget(torch.tensor([[True, False]]))  # before anything was earned
    first = credit.adjust(logits, index, is_real)
    again = credit.adjust(logits, index, is_real)
    assert (again > first).sum() == 2 and (again[..., 1] == -math.inf).all()
    credit.forget(torch.tensor([[True, False]]))
    last = credit.adjust(logits, index, is_real)
    assert torch.equal(last[0, 0], first[0, 0]) and last[0, 1, 2] > again[0, 1, 2]
