"""Interval cache: what is open is recomputed in every pass, what is known every few passes."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from unidiff.decoding.policies.base import Policy, check_whole
from unidiff.decoding.policies.rows import Past, plan_rows
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
    _past: dict[int, Past] = field(default_factory=dict, init=False, repr=False)  # by stream

    def __post_init__(self) -> None:
        check_whole("interval", self.interval, 1)

    @property
    def store(self) -> StoreOptions:  # type: ignore[override]
        """Keys and values."""
        return StoreOptions(rotated=self.rotated)

    def plan(self, state: DecodeState, candidates: Tensor) -> CachePlan:
        """See `RefreshPolicy.plan`."""
        plans = {stream: self._stream_plan(stream, state, candidates) for stream in state.streams}
        own = plans.pop(0)
        return own.with_streams(plans) if plans else own

    def _stream_plan(self, stream: int, state: DecodeState, candidates: Tensor) -> CachePlan:
        busy, valid = state.users[stream][:, None], state.batch.valid
        past = self._past.get(stream) or Past.start(state)
        self._past[stream] = past.after(state, state.users[stream])
        fresh = (past.passes % self.interval == 0)[:, None]  # [B, 1]
        query = (valid & fresh) | ((candidates | (state.ids != past.seen)) & valid)
        return plan_rows(state, query & busy, candidates)
