"""Caches of a decoding block: a region around the block is recomputed in every pass, the rest when the block begins."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from unidiff.decoding.cache.base import Policy, check_settings, check_whole
from unidiff.decoding.state import DecodeState
from unidiff.models.partial import CachePlan
from unidiff.models.store import StoreOptions
from unidiff.tokens import Modality


class Past(NamedTuple):
    """What the rows of a guidance stream did so far, int64 `[B]` each.

    passes: those that the row had a use for. since: passes since it recomputed everything. ids: `[B, L]`, its tokens
    then. blocks: the block of each modality in its last pass.
    """

    passes: Tensor
    since: Tensor
    ids: Tensor
    blocks: dict[Modality, Tensor]


@dataclass
class BlockRefresh(Policy, ABC):
    """When rows recompute everything; subclasses say what they recompute in between (`region`).

    A row refreshes in its first pass, whenever one of its modalities begins a block (also an earlier one, after
    remasking), and by `interval` and `drift`. Rows and guidance streams refresh apart from each other: a row in a batch equals the
    row alone.

    Args:
        interval: passes between two refreshes of a row within a block; None for no more than one per block, 1 is no cache.
        drift: a row refreshes as soon as this share of its targets has changed since it last did; None for no such rule,
            0 is no cache.
        warmup: first passes of a row, all of which recompute everything.
        rotated: keep keys after rotary (the same result, less work per pass).
    """

    interval: int | None = None
    drift: float | None = None
    warmup: int = 0
    rotated: bool = True
    _past: dict[int, Past] = field(default_factory=dict, init=False, repr=False)  # by stream

    def __post_init__(self) -> None:
        check_settings(self)
        if self.interval is not None:
            check_whole("interval", self.interval, 1)
        check_whole("warmup", self.warmup, 0)
        if self.drift is not None and not 0 <= self.drift <= 1:
            raise ValueError(f"drift is {self.drift!r}; expected a share between 0 and 1, or None")

    @property
    def store(self) -> StoreOptions:  # type: ignore[override]
        """Keys and values."""
        return StoreOptions(rotated=self.rotated)

    @abstractmethod
    def region(self, state: DecodeState, block: Tensor) -> Tensor:
        """bool `[B, L]`, recomputed in every pass; `block` `[B, L]` holds the positions of a block being decoded."""

    def plan(self, state: DecodeState, candidates: Tensor) -> CachePlan:
        """See `RefreshPolicy.plan`."""
        region = candidates
        for clock in state.progress.values():
            region = region | self.region(state, clock.in_block)
        region = region & state.batch.valid
        alike = state.alike()
        plans: dict[int, CachePlan] = {}
        made: dict[int, tuple[CachePlan, Past]] = {}
        for stream, same in zip(state.streams, alike, strict=True):
            past = self._past.get(stream)
            if same and id(past) in made:  # streams that did the same so far and serve the same rows
                plans[stream], self._past[stream] = made[id(past)]
                continue
            query, fresh, now = self._stream_query(state, region, past, state.users[stream])
            plans[stream], self._past[stream] = self._plan(state, query, fresh, candidates), now
            if same:
                made[id(past)] = plans[stream], now
        first = plans.pop(0)
        others = {stream: plan for stream, plan in plans.items() if plan is not first}
        return first.with_streams(others) if others else first

    def _plan(self, state: DecodeState, query: Tensor, fresh: Tensor, candidates: Tensor) -> CachePlan:
        """A full plan where every row that is not complete refreshes."""
        flags = [(fresh | ~state.unfinished).all().long(), fresh.any().long(), query.sum(1).max()]
        full, some, width = torch.stack(flags).tolist()
        if full:
            return CachePlan(logits=candidates)
        return CachePlan(query, candidates, full=False, width=width, fresh=fresh if some else None)

    def _stream_query(
        self, state: DecodeState, region: Tensor, past: Past | None, busy: Tensor
    ) -> tuple[Tensor, Tensor, Past]:
        """What the rows `busy` `[B]` of a stream recompute: some positions `[B, L]`, or everything `[B]`."""
        if past is None:
            zero = torch.zeros_like(busy, dtype=torch.long)
            past = Past(zero, zero, state.ids, {modality: zero - 1 for modality in state.progress})
        fresh, blocks = past.passes <= max(0, self.warmup - 1), {}
        for modality, clock in state.progress.items():
            fresh = fresh | (clock.running & (clock.block != past.blocks[modality]))
            blocks[modality] = torch.where(clock.running & busy, clock.block, past.blocks[modality])
        if self.interval is not None:
            fresh = fresh | (past.since + 1 >= self.interval)
        if self.drift is not None:
            targets = state.batch.targets
            changed = (targets & (state.ids != past.ids)).sum(1)
            fresh = fresh | (changed >= self.drift * targets.sum(1))
        fresh = fresh & busy
        query = region & (busy & ~fresh)[:, None]
        since = torch.where(busy, torch.where(fresh, 0, past.since + 1), past.since)
        ids = torch.where(fresh[:, None], state.ids, past.ids)
        return query, fresh, Past(past.passes + busy.long(), since, ids, blocks)


def places(like: Tensor) -> Tensor:
    """int64 `[1, L]`: 0, 1, 2, ... along the row."""
    return torch.arange(like.shape[1], device=like.device)[None]


def first_and_last(where: Tensor) -> tuple[Tensor, Tensor]:
    """int64 `[B, 1]` each: first and last place of a flag; (L, -1) in rows without."""
    place = places(where)
    first = torch.where(where, place, where.shape[1]).amin(1, keepdim=True)
    return first, torch.where(where, place, -1).amax(1, keepdim=True)
