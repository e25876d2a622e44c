"""Rotary position tables (1-D for sequences, 2-D for image grids) and the half-split rotation.

RoFormer (Su et al. 2021), eq. 34: features i and i + d/2 of a head turn together by the angle position * theta^(-2i/d).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from unidiff.tokens.vocabulary import Modality


class RotaryTables(NamedTuple):
    """cos and (-sin, sin) of every position's angles, `[B, L, 1, head_dim]`, shared by all layers and heads."""

    cos: Tensor
    signed_sin: Tensor


def rotary_tables(
    positions: Tensor,
    modality: Tensor,
    head_dim: int,
    kind: str = "2d",
    theta: float = 1e4,
    linear_factor: float | Tensor = 1.0,
    dtype: torch.dtype = torch.float32,
) -> RotaryTables:
    """Tables for one batch.

    Args:
        positions: int64 `[B, L, 3]`: (index in the sample, image row, image column).
        modality: int64 `[B, L]`.
        head_dim: features per head; divisible by 4 for `kind="2d"`.
        kind: "1d": every token turns by its index. "2d": image tokens turn by row and column instead, in the
            interleaved layout [h0, w0, h1, w1, ...] of UniDisc, whose frequencies are theta^(-4i/head_dim).
        theta: base of the frequencies.
        linear_factor: rows and columns are divided by it (UniDisc: 1 at 256 px, 2 at 512 px); a number, or one per
            token `[B, L, 1]`.
        dtype: of the angles and tables; float32 or float64.
    """
    index = positions[..., 0, None].to(dtype)  # [B, L, 1]
    angles = index * _frequencies(head_dim // 2, theta, index)  # [B, L, d/2]
    if kind == "2d":
        grid = positions[..., 1:].to(dtype) / linear_factor  # [B, L, 2]
        frequencies = _frequencies(head_dim // 4, theta, index)
        by_place = (frequencies[:, None] * grid[..., None, :]).flatten(-2)  # [B, L, d/4, 2] -> [B, L, d/2]
        angles = torch.where((modality == Modality.IMAGE)[..., None], by_place, angles)
    cos, sin = angles[:, :, None].cos(), angles[:, :, None].sin()  # [B, L, 1, d/2]
    return RotaryTables(torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1))


def rotate(x: Tensor, tables: RotaryTables) -> Tensor:
    """Turn `x` `[B, L, H, d]` by the tables' angles; computed in the tables' dtype, returned in that of `x`."""
    cos, signed_sin = tables
    # rolling by d/2 swaps the halves, so this is (a cos - b sin, b cos + a sin)
    return (x * cos + x.roll(x.shape[-1] // 2, dims=-1) * signed_sin).to(x.dtype)


def _frequencies(count: int, theta: float, like: Tensor) -> Tensor:
    exponent = torch.arange(count, dtype=like.dtype, device=like.device) / count
    return theta**-exponent  # [count]
