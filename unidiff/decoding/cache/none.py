"""No cache: every pass recomputes everything. The reference that caches are compared with."""

from __future__ import annotations

from typing import Any, Self

from torch import Tensor

from unidiff.decoding.cache.base import Policy
from unidiff.decoding.row_decode import RowDecode, RowMoment, RowWork
from unidiff.decoding.state import DecodeState
from unidiff.models.partial import CachePlan
from unidiff.tokens import TokenBatch


class NoCache(Policy):
    """Full passes, logits at the candidates."""

    name = "none"

    def start(self, batch: TokenBatch, model: Any) -> Self:
        return self

    def plan(self, state: DecodeState, candidates: Tensor) -> CachePlan:
        return CachePlan(logits=candidates)

    def row_work(self, decode: RowDecode, now: RowMoment, layers: int) -> RowWork:
        return RowWork.even(layers, decode.length, decode.length, now.masked, now.ids)
