"""Caches of a decoding block: a region around the block is recomputed in every pass, the rest when the block begins.

Prefix and dual cache are those of Fast-dLLM (Wu et al. 2025, arXiv 2505.22618), the vicinity cache that of dInfer (arXiv
2510.08666).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from unidiff.decoding.cache.base import StoringPolicy, StreamPlan
from unidiff.decoding.row_decode import RowDecode, RowMoment, RowWork
from unidiff.decoding.state import DecodeState
from unidiff.models.denoiser import DenoiserTraits
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
    reads_shown = True

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

    def reference_bound(self, decode: RowDecode, traits: DenoiserTraits) -> float | None:
        """Over blocks, sum n / sum (1 + (n - 1) R / S), where R places are recomputed: B (dual), S - s from place s (prefix)."""
        if self.interval is not None or self.warmup:
            return None
        n, regions = float(decode.passes), [self.row_region(decode, s, s + size) for s, size, _ in decode.blocks]
        return n * len(regions) / sum(1 + (n - 1) * (last - first) / decode.length for first, last in regions)


def places(like: Tensor) -> Tensor:
    """int64 `[1, L]`: 0, 1, 2, ... along the row."""
    return torch.arange(like.shape[1], device=like.device)[None]


def first_and_last(where: Tensor) -> tuple[Tensor, Tensor]:
    """int64 `[B, 1]` each: first and last place of a flag; (L, -1) in rows without."""
    place = places(where)
    first = torch.where(where, place, where.shape[1]).amin(1, keepdim=True)
    return first, torch.where(where, place, -1).amax(1, keepdim=True)


@dataclass
class PrefixCache(BlockRefresh):
    """What stands before the block keeps the keys and values of the block's first pass.

    Cost of a block that starts at s in a row of S, n passes: 1 + (n - 1) (S - s) / S full passes. For weights trained
    with full attention an approximation; `BlockCausalCache` is the exact form for block-causal ones.
    """

    name = "prefix"
    foretold = True

    def region(self, state: DecodeState, block: Tensor) -> Tensor:
        return places(block) >= first_and_last(block)[0]

    def row_region(self, decode: RowDecode, first: int, last: int) -> tuple[int, int]:
        return first, decode.length


@dataclass
class DualCache(BlockRefresh):
    """Everything before and behind the block keeps the keys and values of the block's first pass.

    Cost of a block of B tokens in a row of S, n passes: 1 + (n - 1) B / S full passes. An approximation: what stands
    around the block does not see what is written into it. Text and image blocks that are decoded in the same pass are
    both recomputed.
    """

    name = "dual"
    foretold = True
    # Only the block, everything every 8 passes. (Fast-dLLM, which refreshes once per block of 32, reports 1.3 and 3.5
    # points of GSM8K lost with LLaDA; not measured here.)
    auto: ClassVar[Mapping[str, Mapping[str, Any]]] = {"text": {"interval": 8}}

    def region(self, state: DecodeState, block: Tensor) -> Tensor:
        return block

    def row_region(self, decode: RowDecode, first: int, last: int) -> tuple[int, int]:
        return first, last


@dataclass
class VicinityCache(BlockRefresh):
    """A window from `look_back` places before the block to `look_ahead` behind it is recomputed in every pass.

    Between `DualCache` (both 0) and no cache. What is near a block depends on it most. Places count along the row, so
    for images in raster order 16 places are half a line of 32.

    Args:
        look_back, look_ahead: places on either side.
        warmup: dInfer makes the first 4 passes without a cache.
    """

    name = "vicinity"
    foretold = True
    warmup: Annotated[int, Between(0)] = 4
    look_back: Annotated[int, Between(0)] = 16
    look_ahead: Annotated[int, Between(0)] = 16

    def region(self, state: DecodeState, block: Tensor) -> Tensor:
        place = places(block)
        first, last = first_and_last(block)
        return (place >= first - self.look_back) & (place <= last + self.look_ahead) & (last >= 0)

    def row_region(self, decode: RowDecode, first: int, last: int) -> tuple[int, int]:
        return max(first - self.look_back, 0), min(last + self.look_ahead, decode.length)
