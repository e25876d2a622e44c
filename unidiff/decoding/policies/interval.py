"""Interval cache: what is open is recomputed in every pass, what is known every few passes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from unidiff.decoding.policies.base import check_whole
from unidiff.decoding.policies.held import HeldGuidance
from unidiff.decoding.policies.rows import Past, plan_rows
from unidiff.decoding.state import DecodeState
from unidiff.models.partial import CachePlan
from unidiff.models.store import StoreOptions


@dataclass
class IntervalCache(HeldGuidance):
    """Known tokens keep keys and values for `interval` passes of their row (dKV-Cache, Ma et al. 2025, arXiv 2505.15781).

    A token is recomputed once more in the pass after it changed, and may be kept from then on: its features before
    that are those of a [MASK]. Of a segment of given tokens nothing is recomputed between two refreshes, which makes
    this the policy of a long prompt.

    Cost of a pass with M candidates and W tokens written in the pass before, in a row of S: S / interval
    + (1 - 1 / interval) (M + W) tokens on average; of an unconditional stream, a share 1 / guidance_interval of that.

    Args:
        interval: passes between two refreshes of a row; 1 is no cache.
        rotated: keep keys after rotary (the same result, less work per pass).
        guidance_interval, guidance_warmup: see `HeldGuidance`.

    Raises:
        ValueError: a setting is not a whole number in its range.
    """

    interval: int = 20
    rotated: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("interval", self.interval, 1)

    @property
    def store(self) -> StoreOptions:  # type: ignore[override]
        """Keys and values."""
        return StoreOptions(rotated=self.rotated)

    def _stream_plan(self, stream: int, state: DecodeState, candidates: Tensor) -> CachePlan:
        busy, valid = state.users[stream][:, None], state.batch.valid
        past = self._past.get(stream) or Past.start(state)
        self._past[stream] = past.after(state, state.users[stream])
        fresh = (past.passes % self.interval == 0)[:, None]  # [B, 1]
        query = (valid & fresh) | ((candidates | (state.ids != past.seen)) & valid)
        return plan_rows(state, query & busy, candidates)
