"""Rotary tables: relative in one and two dimensions, half-split, UniDisc's layout."""

from __future__ import annotations

import itertools

import torch

from unidiff.models.parts import rotate
from unidiff.models.transformer import rotary_tables


def scores(positions: torch.Tensor, modality: int, kind: str, theta: float = 50.0) -> torch.Tensor:
    """q . k of the same two vectors placed at every pair of `positions` `[L, 3]`; `[L, L]`."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 16, generator=generator, dtype=torch.float64)
    length = len(positions)
    tables = rotary_tables(
        positions[None], torch.full((1, length), modality), 16, kind, theta=theta, dtype=torch.float64
    )
    q, k = (rotate(v.expand(1, length, 1, 16), tables)[0, :, 0] for v in (q, k))
    return q @ k.T


def grid(height: int, width: int) -> torch.Tensor:
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack((torch.arange(height * width), rows.flatten(), columns.flatten()), -1)


def test_image_scores_depend_on_row_and_column_offsets_only():
    positions = grid(4, 5)
    base = scores(positions, 1, "2d")
    torch.testing.assert_close(scores(positions + torch.tensor([70, 3, 11]), 1, "2d"), base)
    by_offset: dict[tuple[int, int], list[float]] = {}
    for i, (_, row, column) in enumerate(positions.tolist()):
        for j, (_, other_row, other_column) in enumerate(positions.tolist()):
            by_offset.setdefault((row - other_row, column - other_column), []).append(float(base[i, j]))
    assert all(max(v) - min(v) < 1e-9 for v in by_offset.values())
    values = sorted(v[0] for v in by_offset.values())
    assert min(b - a for a, b in itertools.pairwise(values)) > 1e-6, "two offsets look the same"


def test_text_scores_depend_on_the_index_offset_only():
    positions = torch.zeros(7, 3, dtype=torch.long)
    positions[:, 0] = torch.arange(7)
    for kind in ("1d", "2d"):
        base = scores(positions, 0, kind)
        torch.testing.assert_close(scores(positions + torch.tensor([5, 2, 9]), 0, kind), base)
        assert (base.diagonal(1) - base[0, 1]).abs().max() < 1e-9


def test_one_dimensional_images_ignore_rows_and_columns():
    a = scores(grid(3, 4), 1, "1d")
    b = scores(grid(4, 3), 1, "1d")
    torch.testing.assert_close(a, b)
    assert not torch.allclose(scores(grid(3, 4), 1, "2d"), a)


def test_linear_factor_divides_rows_and_columns():
    modality = torch.ones(1, 16, dtype=torch.long)
    coarse = rotary_tables(grid(4, 4)[None], modality, 8, "2d")
    fine = rotary_tables(2 * grid(4, 4)[None], modality, 8, "2d", linear_factor=2.0)
    torch.testing.assert_close(coarse.cos, fine.cos)


def test_rotation_is_half_split_and_keeps_lengths():
    positions = torch.tensor([[[1, 0, 0]]])
    tables = rotary_tables(positions, torch.zeros(1, 1, dtype=torch.long), 4, "1d", theta=100.0)
    x = torch.tensor([1.0, 0.0, 0.0, 0.0]).view(1, 1, 1, 4)
    angle = torch.tensor(1.0)
    torch.testing.assert_close(
        rotate(x, tables).flatten(), torch.stack((angle.cos(), x.new_zeros(()), angle.sin(), x.new_zeros(())))
    )
    y = torch.randn(1, 1, 3, 4)
    torch.testing.assert_close(rotate(y, tables).norm(dim=-1), y.norm(dim=-1))
    assert rotate(y.bfloat16(), tables).dtype == torch.bfloat16
