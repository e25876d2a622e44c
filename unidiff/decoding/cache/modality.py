"""Modality-alternating cache (UniDisc, Swerdlow et al. 2025, arXiv 2503.20853): one modality moves, the other is held."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from torch import Tensor

from unidiff.decoding.cache.base import StoringPolicy, StreamPlan
from unidiff.decoding.state import DecodeState
from unidiff.schema import Between
from unidiff.tokens import Modality


@dataclass
class ModalityCache(StoringPolicy):
    """Cycles of `interval` passes: first `joint` passes that compute and decode everything, then some without `held`.

    In between, tokens of the held modality keep their features, save those that were just written, and none of them is
    decoded; its progress stands still. A row that has nothing else left to decode goes back to joint passes. Cost of a
    cycle with H held tokens in a row of S: interval S - (interval - joint) H, and once more those written.

    The reference keeps features of a second joint pass, in which the image sees itself alone, and trains for that by
    dropping attention between modalities. Here the features are those of the last joint pass with the model's own
    attention, so for other weights this is an approximation like every cache.

    Args:
        interval: passes per cycle; UniDisc's ratio is 10.
        joint: passes at the head of a cycle that decode both modalities; `joint = interval` is no cache.
        held: `image` or `text`.
        rotated: keep keys after rotary (the same result, less work per pass).
    """

    name = "modality"
    whole_rows = reads_shown = foretold = True
    interval: Annotated[int, Between(1)] = 10
    joint: Annotated[int, Between(1)] = 1
    held: Literal["image", "text"] = "image"
    rotated: bool = True
    _together: Tensor = field(init=False, repr=False, compare=False)  # bool [B], rows in a joint pass
    _held: Tensor = field(init=False, repr=False, compare=False)  # bool [B, L]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.joint > self.interval:
            raise ValueError(f"joint is {self.joint}, more than the {self.interval} passes of a cycle; lower it")

    def begin_pass(self, state: DecodeState, candidates: Tensor) -> Tensor:
        self._held = state.batch.modality == (Modality.IMAGE if self.held == "image" else Modality.TEXT)
        moving = (candidates & ~self._held).any(1)  # [B]
        self._together = (self.past(state).passes % self.interval < self.joint) | ~moving
        return candidates & (~self._held | self._together[:, None])

    def plan_stream(self, state: DecodeState, candidates: Tensor, stream: int, rows: Tensor) -> StreamPlan:
        past = self.past(state, stream)
        whole = self._together | (past.passes == 0)  # a stream that joins late computes everything once
        query = whole[:, None] | ~self._held | (state.ids != past.seen)
        return StreamPlan(query & state.batch.valid & rows[:, None])
