"""Rows of a batch picked by an index, whatever the memory looks like."""

from __future__ import annotations

import pytest
import torch

from unidiff.models.parts import gather_rows

LAYOUTS = {
    "whole": lambda rows: torch.randn(rows, 9, 8),
    "a spare position behind": lambda rows: torch.randn(rows, 10, 8)[:, :-1],
    "a spare position in front": lambda rows: torch.randn(rows, 10, 8)[:, 1:],
    "half the features": lambda rows: torch.randn(rows, 9, 16)[..., :8],
    "transposed": lambda rows: torch.randn(rows, 8, 9).transpose(1, 2),
    "one row for all": lambda rows: torch.randn(9, 8).expand(rows, 9, 8),
    "bool": lambda rows: torch.randn(rows, 9, 8) > 0,
}


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gather_rows_takes_the_indexed_positions(layout: str, rows: int):
    torch.manual_seed(0)
    x, index = LAYOUTS[layout](rows), torch.randint(0, 12, (rows, 5))
    expected = torch.stack([x[b, index[b].clamp_max(8)] for b in range(rows)])
    assert torch.equal(gather_rows(x, index), expected)


def test_gather_rows_passes_gradients_and_takes_nothing():
    x, index = torch.randn(2, 9, 8, requires_grad=True), torch.tensor([[1, 1, 8], [0, 12, 3]])
    gather_rows(x, index).sum().backward()
    count = torch.zeros(2, 9).scatter_add_(1, index.clamp_max(8), torch.ones(2, 3))
    assert torch.equal(x.grad, count[..., None].expand(2, 9, 8))
    assert gather_rows(x, index[:, :0]).shape == (2, 0, 8)
