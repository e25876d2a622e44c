"""No cache: every pass recomputes everything. The reference that caches are compared with."""

from __future__ import annotations

from torch import Tensor

from unidiff.decoding.cache.base import Policy
from unidiff.decoding.state import DecodeState
from unidiff.models.partial import CachePlan


class NoCache(Policy):
    """Full passes, logits at the candidates."""

    def plan(self, state: DecodeState, candidates: Tensor) -> CachePlan:
        return CachePlan(logits=candidates)
