"""Sequence packing: samples of different lengths share rows, and attention keeps them apart.

A packed batch trains exactly as the batch it was made from: every token keeps its position in its sample, its noise, its
rate and its weight, and sees the tokens of its own sample only (`TokenBatch.sample_ids`). Only the padding goes.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

import torch
from torch import Tensor

from unidiff.tokens import Modality, TokenBatch
from unidiff.train.data.tasks import TaskBatch


def pack_lengths(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Put samples into as few rows as best-fit decreasing finds: longest first, each where it leaves least room.

    Args:
        lengths: tokens of each sample.
        capacity: tokens of a row.

    Returns:
        Sample numbers of each row, the same for the same lengths.

    Raises:
        ValueError: a sample without tokens, or one longer than a row.
    """
    for number, length in enumerate(lengths):
        if not 0 < length <= capacity:
            raise ValueError(f"sample {number} has {length} tokens; rows hold 1 to {capacity}, raise data.pack")
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, row), ascending
    for number in sorted(range(len(lengths)), key=lambda n: (-lengths[n], n)):
        place = bisect_left(room, (lengths[number], -1))
        free, row = room.pop(place) if place < len(room) else (capacity, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(number)
        insort(room, (free - lengths[number], row))
    return rows


class Packer:
    """Where every token of a batch goes.

    Args:
        batch: one sample, or several, per row; batch padding anywhere.
        capacity: tokens of a packed row.

    Attributes:
        rows: number of packed rows.
        waste: share of the packed tokens that is padding.
    """

    def __init__(self, batch: TokenBatch, capacity: int) -> None:
        valid = batch.valid
        lengths = valid.sum(1)  # [B]
        bins = pack_lengths(lengths.tolist(), capacity)
        self.rows, self.capacity = len(bins), capacity
        row, offset = torch.zeros_like(lengths), torch.zeros_like(lengths)
        for number, members in enumerate(bins):
            start = 0
            for sample in members:
                row[sample], offset[sample] = number, start
                start += int(lengths[sample])
        column = offset[:, None] + valid.long().cumsum(1) - 1  # [B, L]
        self._valid, self._to = valid, (row[:, None] * capacity + column)[valid]  # [tokens]
        self.waste = 1 - len(self._to) / (self.rows * capacity)

    def __call__(self, values: Tensor, fill: float | bool) -> Tensor:
        """Move `[B, L, ...]` to `[rows, capacity, ...]`, with `fill` on padding."""
        out = values.new_full((self.rows * self.capacity, *values.shape[2:]), fill)
        out[self._to] = values[self._valid]
        return out.view(self.rows, self.capacity, *values.shape[2:])


def pack_batch(batch: TokenBatch, capacity: int, packer: Packer | None = None) -> TokenBatch:
    """The same samples in rows of `capacity` tokens, `[rows, capacity]`."""
    packer = packer or Packer(batch, capacity)
    numbers = torch.arange(len(batch.ids), device=batch.ids.device)[:, None]
    # unique in any row, also where the samples' own rows held several
    sample_ids = numbers * (int(batch.sample_ids.max()) + 1) + batch.sample_ids
    return TokenBatch(
        ids=packer(batch.ids, 0),
        modality=packer(batch.modality, int(Modality.TEXT)),
        given=packer(batch.given, True),
        valid=packer(batch.valid, False),
        positions=packer(batch.positions, 0),
        sample_ids=packer(sample_ids, -1),
    )


def pack_tasks(micro: TaskBatch, capacity: int) -> TaskBatch:
    """A batch of tasks in packed rows; `task` and `rate` are then per token, `[rows, capacity]`."""
    packer = Packer(micro.batch, capacity)
    shape = micro.batch.shape
    return TaskBatch(
        pack_batch(micro.batch, capacity, packer),
        task=packer(micro.task[:, None].expand(shape), 0),
        rate=packer(micro.rate[:, None].expand(shape), 0.0),
        noise=packer(micro.noise, 1.0),
        weight=packer(micro.weight, 0.0),
    )
