"""Caches of a decoding block: a region around the block is recomputed in every pass, the rest when the block begins."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor

from unidiff.decoding.policies.base import Policy, check_whole
from unidiff.decoding.state import DecodeState
from unidiff.models.partial import CachePlan
from unidiff.models.store import StoreOptions
from unidiff.tokens import Modality


@dataclass
class BlockRefresh(Policy, ABC):
    """When rows recompute everything; subclasses say what they recompute in between (`region`).

    A row refreshes in its first pass, whenever one of its modalities begins a block (also an earlier one, after
    remasking), and by `interval`. Rows refresh apart from each other: a row in a batch equals the row alone.

    Args:
        interval: passes between two refreshes of a row within a block; None for no more than one per block, 1 is no cache.
        warmup: first passes of a row, all of which recompute everything.
        rotated: keep keys after rotary (the same result, less work per pass).
    """

    interval: int | None = None
    warmup: int = 0
    rotated: bool = True
    _made: Tensor | None = field(default=None, init=False, repr=False)  # [B] passes of the row
    _since: Tensor | None = field(default=None, init=False, repr=False)  # [B] passes since its last refresh
    _block: dict[Modality, Tensor] = field(default_factory=dict, init=False, repr=False)  # [B]

    def __post_init__(self) -> None:
        if self.interval is not None:
            check_whole("interval", self.interval, 1)
        check_whole("warmup", self.warmup, 0)

    @property
    def store(self) -> StoreOptions:  # type: ignore[override]
        """Keys and values."""
        return StoreOptions(rotated=self.rotated)

    @abstractmethod
    def region(self, state: DecodeState, block: Tensor) -> Tensor:
        """bool `[B, L]`, recomputed in every pass; `block` `[B, L]` holds the positions of a block being decoded."""

    def plan(self, state: DecodeState, candidates: Tensor) -> CachePlan:
        """See `RefreshPolicy.plan`."""
        busy = candidates.any(1)  # [B]
        fresh = self._due(state, busy)
        region = torch.zeros_like(candidates)
        for clock in state.clocks.values():
            region = region | self.region(state, clock.in_block)
        valid = state.batch.valid
        query = torch.where(fresh[:, None], valid, (region | candidates) & valid) & busy[:, None]
        whole, width = torch.stack([(fresh | ~busy).all().long(), query.sum(1).max()]).tolist()
        if whole:
            return CachePlan(logits=candidates)
        return CachePlan(query, candidates, full=False, width=width)

    def _due(self, state: DecodeState, busy: Tensor) -> Tensor:
        """bool `[B]`: rows that recompute everything in this pass."""
        if self._made is None or self._since is None:
            self._made = self._since = torch.zeros_like(busy, dtype=torch.long)
        fresh = (self._made == 0) | (self._made < self.warmup)
        for modality, clock in state.clocks.items():
            last = self._block.get(modality, torch.full_like(clock.block, -1))
            fresh = fresh | (clock.running & (clock.block != last))
            self._block[modality] = torch.where(clock.running & busy, clock.block, last)
        if self.interval is not None:
            fresh = fresh | (self._since + 1 >= self.interval)
        fresh = fresh & busy
        self._made = self._made + busy.long()
        self._since = torch.where(fresh, 0, self._since + busy.long())
        return fresh


def places(like: Tensor) -> Tensor:
    """int64 `[1, L]`: 0, 1, 2, ... along the row."""
    return torch.arange(like.shape[1], device=like.device)[None]


def first_and_last(where: Tensor) -> tuple[Tensor, Tensor]:
    """int64 `[B, 1]` each: first and last place of a flag; (L, -1) in rows without."""
    place = places(where)
    first = torch.where(where, place, where.shape[1]).amin(1, keepdim=True)
    return first, torch.where(where, place, -1).amax(1, keepdim=True)
