"""Interval cache: what is open is recomputed in every pass, what is known every few passes."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from unidiff.decoding.cache.base import Policy, check_settings, check_whole
from unidiff.decoding.cache.rows import plan_rows
from unidiff.decoding.state import DecodeState
from unidiff.models.partial import CachePlan
from unidiff.models.store import StoreOptions


@dataclass
class IntervalCache(Policy):
    """Known tokens keep keys and values for `interval` passes of their row (dKV-Cache, Ma et al. 2025, arXiv 2505.15781).

    A token is recomputed once more in the pass after it changed, and may be kept from then on: its features before
    that are those of a [MASK]. Of a segment of given tokens nothing is recomputed between two refreshes, which makes
    this the policy of a long prompt.

    Cost of a pass with M candidates and W tokens written in the pass before, in a row of S: S / interval
    + (1 - 1 / interval) (M + W) tokens on average.

    Args:
        interval: passes between two refreshes of a row; 1 is no cache.
        rotated: keep keys after rotary (the same result, less work per pass).

    Raises:
        ValueError: `interval` is not a whole number of at least 1.
    """

    interval: int = 20
    rotated: bool = True
    # of a request: passes of its rows, int64 [B]; by stream the pass of its last refresh [B], and its ids in the last one [B, L]
    _passes: Tensor | None = field(default=None, init=False, repr=False)
    _refreshed: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False)
    _seen: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        check_settings(self)
        check_whole("interval", self.interval, 1)

    @property
    def store(self) -> StoreOptions:  # type: ignore[override]
        """Keys and values."""
        return StoreOptions(rotated=self.rotated)

    def plan(self, state: DecodeState, candidates: Tensor) -> CachePlan:
        """See `RefreshPolicy.plan`. Guidance streams of a pass do the same, so that they run as rows of one call."""
        valid, busy = state.batch.valid, {s: state.users[s] for s in state.streams}
        now = torch.zeros_like(state.ids[:, 0]) if self._passes is None else self._passes
        fresh, changed = torch.zeros_like(valid[:, 0]), torch.zeros_like(valid)
        for stream, rows in busy.items():
            last = self._refreshed.setdefault(stream, now - self.interval)
            fresh |= rows & (now - last >= self.interval)
            changed |= rows[:, None] & (state.ids != self._seen.setdefault(stream, state.ids))
        query = valid & (fresh[:, None] | candidates | changed)
        plans = {}
        for stream, rows in busy.items():
            plans[stream] = plan_rows(state, query & rows[:, None], candidates)
            self._refreshed[stream] = torch.where(rows & fresh, now, self._refreshed[stream])
            self._seen[stream] = torch.where(rows[:, None], state.ids, self._seen[stream])
        self._passes = now + torch.stack(list(busy.values())).any(0).long()
        own = plans.pop(0)
        return own.with_streams(plans) if plans else own
