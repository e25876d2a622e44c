"""Blocks: which targets of a modality are decoded together, in which order, and how many blocks at once."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from unidiff.tokens import Modality, TokenBatch


def block_ids(batch: TokenBatch, targets: Tensor, length: int, order: str = "sequence") -> Tensor:
    """int64 `[B, L]`: the block of each target; blocks are decoded in ascending order.

    A block holds `length` *target* positions, so known tokens in between use up nothing. The last may be shorter.

    Args:
        targets: bool `[B, L]`, those of one modality. length: positions per block.
        order: `sequence`; `aligned`: runs of `length` positions of the sample, numbered from that of the row's first target;
            `checkerboard`: cells with even row + column first; `coarse`: a coarse grid first, then finer
            ones; `halton`: cells in the order in which the Halton sequence of bases 2 and 3 visits them.
    """
    if order == "aligned":
        run = torch.div(batch.positions[..., 0], length, rounding_mode="floor")
        first = torch.where(targets, run, run.max()).amin(1, keepdim=True)
        return (run - first).clamp_min(0)
    priority = _priority(batch, order)
    priority = torch.where(targets, priority, priority.max() + 1)  # the rest sorts behind
    rank = priority.argsort(dim=1, stable=True).argsort(1)  # place of each position in decoding order
    return rank // length


def first_offset(batch: TokenBatch, targets: Tensor, length: int) -> Tensor:
    """int64 `[B]`: positions of the first `aligned` block that stand before the row's first target."""
    index = batch.positions[..., 0]
    return torch.where(targets, index, index.max()).amin(1) % length


def _priority(batch: TokenBatch, order: str) -> Tensor:
    row, column = batch.positions[..., 1], batch.positions[..., 2]
    if order == "sequence":
        return torch.zeros_like(row)
    if order == "checkerboard":
        return (row + column) % 2
    if order == "halton":
        return _halton_priority(batch)
    step, level = torch.ones_like(row), torch.zeros_like(row)
    for _ in range(int(batch.positions.max()).bit_length()):  # level = how often 2 divides both row and column
        step = step * 2
        level = level + ((row % step == 0) & (column % step == 0))
    return level.max() - level


def _halton_priority(batch: TokenBatch) -> Tensor:
    """int64 `[B, L]`: rank of each image cell in the order of its own picture, 0 for text."""
    image = batch.modality == Modality.IMAGE
    place = batch.positions[..., 1:]  # [B, L, 2], row and column
    picture = (image & (place == 0).all(-1)).long().cumsum(1)  # a picture begins at its cell (0, 0)
    count = int(picture.max()) + 1
    size = place.new_zeros(len(place), count, 2)
    size = size.scatter_reduce(1, picture[..., None].expand_as(place), place * image[..., None], "amax") + 1
    grid = size.gather(1, picture[..., None].expand_as(place))  # [B, L, 2], height and width of the cell's picture
    priority = torch.zeros_like(picture)
    for height, width in torch.unique(grid[image], dim=0).tolist():
        own = image & (grid[..., 0] == height) & (grid[..., 1] == width)
        ranks = torch.tensor(halton_ranks(height, width), device=place.device)
        priority[own] = ranks[place[own][:, 0] * width + place[own][:, 1]]
    return priority


@lru_cache(maxsize=64)
def halton_ranks(height: int, width: int) -> tuple[int, ...]:
    """When the Halton points (bases 2 down, 3 across) first enter each cell of a grid, cells in raster order.

    Any first part of the order covers the grid evenly, at distances that shrink as it goes on; neighbours, whose codes
    depend on each other most, are far apart in it (Besnier et al. 2025, arXiv 2503.17076).
    """
    order: dict[int, int] = {}
    point = 0
    while len(order) < height * width:
        cell = _stretched(point, 2, height) * width + _stretched(point, 3, width)
        order.setdefault(cell, len(order))
        point += 1
    return tuple(order[cell] for cell in range(height * width))


def _stretched(number: int, base: int, size: int) -> int:
    """floor(size 0.d0 d1 d2 ...), where d0 d1 d2 are the digits of a number from the lowest on; in whole numbers."""
    mirrored, scale = 0, 1
    while number:
        number, digit = divmod(number, base)
        mirrored, scale = mirrored * base + digit, scale * base
    return mirrored * size // scale


def joined_blocks(blocks: Tensor, targets: Tensor, masked: Tensor, block: Tensor, most: int, share: float) -> Tensor:
    """int64 `[B]`: how many blocks behind the current `block` `[B]` are decoded besides it, at most `most`.

    A block joins when the one before it has joined and at least `share` of its `targets` are no longer `masked`.
    """
    if share == 0:
        return torch.full_like(block, most)
    ahead = blocks - block[:, None]  # [B, L]
    near, place = targets & (ahead >= 0) & (ahead < most), ahead.clamp(0, most - 1)
    none = blocks.new_zeros(len(block), most)
    size, left = (none.scatter_add(1, place, which.long()) for which in (near, near & masked))
    follows = (size - left).double() >= share * size  # [B, most]
    return follows.long().cumprod(1).sum(1)
