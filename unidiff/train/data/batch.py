"""`TaskBatch`: samples that are ready to be masked, one per row; then doubled for block diffusion, or packed.

Block diffusion (BD3-LM, Arriola et al. 2025, arXiv 2503.09573, section 3.1 and algorithm 1): when a block is decoded, the
blocks before it are finished. So every noisy block must learn from *clean* earlier blocks, all in one pass: a row holds each
sample twice, clean and noisy, and `Visibility` says what each copy sees. Each block has a time of its own. The loss is the sum
of the blocks' NELBOs given the blocks before them, which bounds -log p of the row more tightly than one time for all.

Packing: samples of different lengths share rows, and attention keeps them apart. A packed batch trains exactly as the batch it
was made from: every token keeps its position in its sample, its noise, its rate and its weight, and sees the tokens of its own
sample only (`TokenBatch.sample_ids`). Only the padding goes.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from unidiff.tokens import Modality, TokenBatch, Visibility


@dataclass(frozen=True)
class TaskBatch:
    """A batch of mixed tasks, ready to be masked: a target is hidden where `noise < rate`, which are ceil(rate * targets).

    Attributes:
        batch: clean ids with `given` set per task; a dropped condition is given as [MASK].
        task: index into `TASKS`; `[B, L]` where samples share rows or have several rates.
        rate: share of the targets to hide. weight: of a position in the loss if it is hidden.
        visible: which keys a query may see, where that is not the batch's own `visibility()`.
    """

    batch: TokenBatch
    task: Tensor  # int64 [B] or [B, L]
    rate: Tensor  # float64, as `task`
    noise: Tensor  # float64 [B, L]
    weight: Tensor  # float32 [B, L]
    visible: Visibility | None = None

    def to(self, device: torch.device) -> TaskBatch:
        moved: dict[str, Any] = {n: value if value is None else value.to(device) for n, value in vars(self).items()}
        return TaskBatch(**moved)

    @classmethod
    def cat(cls, parts: Sequence[TaskBatch]) -> TaskBatch:
        """Stack batches of any lengths along rows, with padding behind the shorter ones; all of one sample per row."""
        if len(parts) == 1:
            return parts[0]
        batch = TokenBatch.cat([part.batch for part in parts])
        task, rate = (torch.cat([getattr(part, name) for part in parts]) for name in ("task", "rate"))
        noise, weight = (
            torch.cat([F.pad(v := getattr(part, name), (0, batch.shape[1] - v.shape[1]), value=fill) for part in parts])
            for name, fill in (("noise", 1.0), ("weight", 0.0))
        )
        return cls(batch, task, rate, noise, weight)


def double_rows(micro: TaskBatch, block_length: int) -> TaskBatch:
    """`[B, L]` rows, with `rate` and `task` per token, as `[B, 2 L]`: the clean tokens, all given, then those to be masked.

    `block_length` is counted in each sample.
    """
    batch = micro.batch
    clean = batch.replace(given=torch.ones_like(batch.given))
    both = TokenBatch(**{name: torch.cat([value, getattr(batch, name)], 1) for name, value in vars(clean).items()})
    return TaskBatch(
        both,
        task=micro.task.repeat(1, 2),
        rate=micro.rate.repeat(1, 2),
        noise=torch.cat([torch.ones_like(micro.noise), micro.noise], 1),
        weight=torch.cat([torch.zeros_like(micro.weight), micro.weight], 1),
        visible=block_visibility(batch, block_length),
    )


def block_visibility(batch: TokenBatch, block_length: int) -> Visibility:
    """What the `[B, 2 L]` tokens of `double_rows` may see."""
    block = torch.div(batch.positions[..., 0], block_length, rounding_mode="floor")  # [B, L]
    sample = batch.sample_ids.masked_fill(~batch.valid, -1)
    clean = torch.zeros_like(batch.valid)
    return Visibility(sample.repeat(1, 2), block.repeat(1, 2), torch.cat([clean, ~clean], 1))


def pack_lengths(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Sample numbers of each row, as few rows as best-fit decreasing finds: longest first, each where it leaves least room.

    Args:
        lengths: tokens of each sample. capacity: tokens of a row.

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


def pack_tasks(micro: TaskBatch, capacity: int) -> TaskBatch:
    """The same samples in rows of `capacity` tokens; `task` and `rate` are then per token, `[rows, capacity]`."""
    batch, valid = micro.batch, micro.batch.valid
    lengths = valid.sum(1)  # [B]
    bins = pack_lengths(lengths.tolist(), capacity)
    start = torch.zeros_like(lengths)  # of each sample, in all rows one after the other
    for number, members in enumerate(bins):
        start[members] = number * capacity + lengths[members].cumsum(0) - lengths[members]
    place = (start[:, None] + valid.long().cumsum(1) - 1)[valid]  # [tokens]

    def packed(values: Tensor, fill: float | bool) -> Tensor:
        values = values[:, None].expand(batch.shape) if values.ndim == 1 else values
        out = values.new_full((len(bins) * capacity, *values.shape[2:]), fill)
        out[place] = values[valid]
        return out.view(len(bins), capacity, *values.shape[2:])

    # unique in any row, also where the samples' own rows held several
    rows = torch.arange(len(batch.ids), device=batch.ids.device)[:, None]
    sample_ids = rows * (int(batch.sample_ids.max()) + 1) + batch.sample_ids
    fills = {"ids": 0, "modality": int(Modality.TEXT), "given": True, "valid": False, "positions": 0}
    tokens = {name: packed(getattr(batch, name), fill) for name, fill in fills.items()}
    task, rate, noise = packed(micro.task, 0), packed(micro.rate, 0.0), packed(micro.noise, 1.0)
    return TaskBatch(
        TokenBatch(**tokens, sample_ids=packed(sample_ids, -1)), task, rate, noise, packed(micro.weight, 0.0)
    )
