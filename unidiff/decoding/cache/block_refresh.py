"""Caches of a decoding block: a region around the block is recomputed in every pass, the rest when the block begins."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from unidiff.decoding.cache.base import StoringPolicy, StreamPlan, check_settings
from unidiff.decoding.row_decode import RowDecode, RowMoment, RowWork
from unidiff.decoding.state import DecodeState
from unidiff.schema import Between


@dataclass
class BlockRefresh(StoringPolicy, ABC):
    """When rows recompute everything; subclasses say what they recompute in between (`region`).

    A row refreshes in its first pass, whenever one of its modalities begins a block (also an earlier one, after
    remasking), and by `interval` and `drift`. Rows and guidance streams refresh apart from each other.

    Args:
        interval: passes between two refreshes of a row within a block; None for no more than one per block, 1 is no cache.
        drift: a row refreshes as soon as this share of its targets has changed since it last did; None for no such rule,
            0 is no cache.
        warmup: first passes of a row, all of which recompute everything.
        rotated: keep keys after rotary (the same result, less work per pass).
    """

    interval: Annotated[int, Between(1)] | None = None
    drift: Annotated[float, Between(0, 1)] | None = None
    warmup: Annotated[int, Between(0)] = 0
    rotated: bool = True

    def __post_init__(self) -> None:
        check_settings(self)

    @abstractmethod
    def region(self, state: DecodeState, block: Tensor) -> Tensor:
        """bool `[B, L]`, recomputed in every pass; `block` `[B, L]` holds the positions of a block being decoded."""

    @abstractmethod
    def row_region(self, decode: RowDecode, first: int, last: int) -> tuple[int, int]:
        """The same for a block from place `first` to before `last` of a row: first place, and the one behind the last."""

    def plan_stream(self, state: DecodeState, candidates: Tensor, stream: int, rows: Tensor) -> StreamPlan:
        past, query = self.past(state, stream), candidates
        notes, since = dict(past.notes), past.notes.get("since", torch.zeros_like(past.passes))
        fresh = past.passes <= max(0, self.warmup - 1)
        for modality, progress in state.progress.items():
            query = query | self.region(state, progress.in_block)
            known = notes.get(modality.name, torch.full_like(past.passes, -1))  # the block in the last pass
            fresh = fresh | (progress.running & (progress.block != known))
            notes[modality.name] = torch.where(progress.running & rows, progress.block, known)
        if self.interval is not None:
            fresh = fresh | (since + 1 >= self.interval)
        if self.drift is not None:
            targets, then = state.batch.targets, notes.get("ids", state.ids)
            fresh = fresh | ((targets & (state.ids != then)).sum(1) >= self.drift * targets.sum(1))
        fresh = fresh & rows
        if self.drift is not None:
            notes["ids"] = torch.where(fresh[:, None], state.ids, then)  # when the row last refreshed
        notes["since"] = torch.where(rows, torch.where(fresh, 0, since + 1), since)
        return StreamPlan(query & state.batch.valid & (rows & ~fresh)[:, None], fresh, notes=notes)

    def row_work(self, decode: RowDecode, now: RowMoment, layers: int) -> RowWork:
        if self.drift is not None:
            raise ValueError("with drift, the number of refreshes depends on what is decoded; no bound is known")
        first, last = 0, decode.length
        if now.number >= self.warmup and now.inside % (self.interval or now.inside + 1):
            first, last = self.row_region(decode, now.start, now.start + now.size)
        return RowWork.even(layers, last - first, decode.length, now.masked, now.ids)


def places(like: Tensor) -> Tensor:
    """int64 `[1, L]`: 0, 1, 2, ... along the row."""
    return torch.arange(like.shape[1], device=like.device)[None]


def first_and_last(where: Tensor) -> tuple[Tensor, Tensor]:
    """int64 `[B, 1]` each: first and last place of a flag; (L, -1) in rows without."""
    place = places(where)
    first = torch.where(where, place, where.shape[1]).amin(1, keepdim=True)
    return first, torch.where(where, place, -1).amax(1, keepdim=True)
