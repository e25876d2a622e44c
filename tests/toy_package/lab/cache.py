"""A cache."""

from dataclasses import dataclass

from torch import Tensor

from unidiff.decoding.cache.base import Policy, StreamPlan
from unidiff.decoding.row_decode import RowDecode, RowMoment, RowWork
from unidiff.decoding.state import DecodeState
from unidiff.models.store import StoreOptions


@dataclass
class EveryNth(Policy):
    """All positions in every n-th pass of a row; in between, those that may be filled now or have changed."""

    name = "every-nth"
    interval: int = 3
    store = StoreOptions()  # keys and values

    def plan_stream(self, state: DecodeState, candidates: Tensor, stream: int, rows: Tensor) -> StreamPlan:
        past, valid = self.past(state, stream), state.batch.valid
        whole = (rows & (past.passes % self.interval == 0))[:, None]
        changed = candidates | (state.ids != past.seen)
        return StreamPlan(valid & (whole | (changed & rows[:, None])))

    def row_work(self, decode: RowDecode, now: RowMoment, layers: int) -> RowWork:
        """What the benchmark's bound and `cache="auto"` reckon with: the work of a pass of one row."""
        queries = decode.length if now.number % self.interval == 0 else now.masked + now.changed
        return RowWork.even(layers, queries, decode.length, now.masked, now.ids)
