"""Interval cache: what is masked is recomputed in every pass, what is known every few passes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from unidiff.decoding.cache.base import StoringPolicy, StreamPlan
from unidiff.decoding.row_decode import RowDecode, RowMoment, RowWork
from unidiff.decoding.state import DecodeState
from unidiff.schema import Between


@dataclass
class IntervalCache(StoringPolicy):
    """Known tokens keep keys and values for `interval` passes of their row (dKV-Cache, Ma et al. 2025, arXiv 2505.15781).

    A token is recomputed once more in the pass after it changed, and may be kept from then on: its features before
    that are those of a [MASK]. Of a segment of given tokens nothing is recomputed between two refreshes, which makes
    this the policy of a long prompt.

    Cost of a pass with M candidates and W tokens written in the pass before, in a row of S: S / interval
    + (1 - 1 / interval) (M + W) tokens on average.

    Args:
        interval: passes between two refreshes of a row; 1 is no cache.
        rotated: keep keys after rotary (the same result, less work per pass).
    """

    name = "interval"
    reads_shown = foretold = True
    auto: ClassVar[Mapping[str, Mapping[str, Any]]] = {"image": {"interval": 8}, "prompt": {"interval": 8}}
    interval: Annotated[int, Between(1)] = 20
    rotated: bool = True
    _fresh: Tensor = field(init=False, repr=False, compare=False)  # bool [B], rows that refresh in this pass
    _query: Tensor = field(init=False, repr=False, compare=False)  # bool [B, L]

    def begin_pass(self, state: DecodeState, candidates: Tensor) -> Tensor:
        """Guidance streams of a pass do the same, so that they run as rows of one call."""
        self._fresh, changed = torch.zeros_like(state.masked[:, 0]), torch.zeros_like(state.masked)
        for stream in state.streams:
            rows = state.users[stream]
            self._fresh = self._fresh | (rows & (self._since(state, stream) >= self.interval))
            changed = changed | (rows[:, None] & (state.ids != self.past(state, stream).seen))
        self._query = state.batch.valid & (self._fresh[:, None] | candidates | changed)
        return candidates

    def plan_stream(self, state: DecodeState, candidates: Tensor, stream: int, rows: Tensor) -> StreamPlan:
        refreshed = self.past(state).passes - torch.where(rows & self._fresh, 0, self._since(state, stream))
        return StreamPlan(self._query & rows[:, None], notes={"refreshed": refreshed})

    def _since(self, state: DecodeState, stream: int) -> Tensor:
        """int64 `[B]`: passes of a row, whatever the stream, since it recomputed everything in this one."""
        passes = self.past(state).passes
        return passes - self.past(state, stream).notes.get("refreshed", passes - self.interval)

    def row_work(self, decode: RowDecode, now: RowMoment, layers: int) -> RowWork:
        queries = decode.length if now.number % self.interval == 0 else now.masked + now.changed
        return RowWork.even(layers, queries, decode.length, now.masked, now.ids)
