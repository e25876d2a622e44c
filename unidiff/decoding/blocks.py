"""Blocks: which masked positions of a modality may be decoded now, and how many passes each block gets."""

from __future__ import annotations

import torch
from torch import Tensor

from unidiff.tokens import TokenBatch


def block_ids(batch: TokenBatch, wanted: Tensor, length: int | None, order: str = "sequence") -> Tensor:
    """int64 `[B, L]`: the block of each wanted position; blocks are decoded in ascending order.

    A block holds `length` *wanted* positions, so known tokens in between use up nothing. The last may be shorter.

    Args:
        batch: for the places of image codes.
        wanted: bool `[B, L]`, the targets of one modality.
        length: positions per block; None puts all in block 0.
        order: `sequence`; `checkerboard`: cells with even row + column first; `coarse`: a coarse grid first, then finer ones.
    """
    if length is None:
        return torch.zeros_like(batch.ids)
    priority = _priority(batch, order)
    priority = torch.where(wanted, priority, priority.max() + 1)  # the rest sorts behind
    rank = priority.argsort(dim=1, stable=True).argsort(1)  # place of each position in decoding order
    return rank // length


def _priority(batch: TokenBatch, order: str) -> Tensor:
    row, column = batch.positions[..., 1], batch.positions[..., 2]
    if order == "sequence":
        return torch.zeros_like(row)
    if order == "checkerboard":
        return (row + column) % 2
    step, level = torch.ones_like(row), torch.zeros_like(row)
    for _ in range(int(batch.positions.max()).bit_length()):  # level = how often 2 divides both row and column
        step = step * 2
        level = level + ((row % step == 0) & (column % step == 0))
    return level.max() - level


def current_block(blocks: Tensor, open_: Tensor) -> Tensor:
    """int64 `[B]`: the lowest block with an open position; a large number where none is open."""
    return torch.where(open_, blocks, torch.iinfo(torch.long).max).amin(1)


def block_steps(steps: int, count: Tensor, block: Tensor) -> tuple[Tensor, Tensor]:
    """Passes for `block` and passes planned before it, int64 `[B]`: `steps` split evenly over `count` blocks.

    The first steps % count blocks get one more; every block gets at least one.
    """
    count = count.clamp_min(1)
    share, extra = steps // count, steps % count
    own = (share + (block < extra)).clamp_min(1)
    return own, block * share + torch.minimum(block, extra)
