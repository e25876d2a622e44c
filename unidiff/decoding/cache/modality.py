"""Modality-alternating cache (UniDisc, Swerdlow et al. 2025, arXiv 2503.20853): one modality moves, the other is held."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from unidiff.decoding.cache.base import Policy, check_settings, check_whole
from unidiff.decoding.cache.rows import Past, plan_rows
from unidiff.decoding.state import DecodeState
from unidiff.models.partial import CachePlan
from unidiff.models.store import StoreOptions
from unidiff.tokens import Modality

HELD = {"image": Modality.IMAGE, "text": Modality.TEXT}


@dataclass
class ModalityCache(Policy):
    """Cycles of `interval` passes: first `joint` passes that compute and decode everything, then some without `held`.

    In between, tokens of the held modality keep their features, save those that were just written, and none of them is
    decoded; its clock stands still. A row that has nothing else left to decode goes back to joint passes. Cost of a
    cycle with H held tokens in a row of S: interval S - (interval - joint) H, and once more those written.

    The reference keeps features of a second joint pass, in which the image sees itself alone, and trains for that by
    dropping attention between modalities. Here the features are those of the last joint pass with the model's own
    attention, so for other weights this is an approximation like every cache.

    Args:
        interval: passes per cycle; UniDisc's ratio is 10.
        joint: passes at the head of a cycle that decode both modalities; `joint = interval` is no cache.
        held: `image` or `text`.
        rotated: keep keys after rotary (the same result, less work per pass).

    Raises:
        ValueError: a setting outside its range.
    """

    interval: int = 10
    joint: int = 1
    held: str = "image"
    rotated: bool = True
    _past: dict[int, Past] = field(default_factory=dict, init=False, repr=False)  # by stream

    def __post_init__(self) -> None:
        check_settings(self)
        check_whole("interval", self.interval, 1)
        check_whole("joint", self.joint, 1)
        if self.joint > self.interval:
            raise ValueError(f"joint is {self.joint}, more than the {self.interval} passes of a cycle; lower it")
        if self.held not in HELD:
            raise ValueError(f"held is {self.held!r}; expected one of {', '.join(HELD)}")

    @property
    def store(self) -> StoreOptions:  # type: ignore[override]
        """Keys and values."""
        return StoreOptions(rotated=self.rotated)

    def plan(self, state: DecodeState, candidates: Tensor) -> CachePlan:
        """See `RefreshPolicy.plan`."""
        held = state.batch.modality == HELD[self.held]
        start = self._past.get(0) or Past.start(state)
        moving = (candidates & ~held).any(1)  # [B]
        together = (start.passes % self.interval < self.joint) | ~moving
        shown = candidates & (~held | together[:, None])
        plans = {}
        for stream in state.streams:
            past = self._past.get(stream) or Past.start(state)
            self._past[stream] = past.after(state, state.users[stream])
            whole = together | (past.passes == 0)  # a stream that joins late computes everything once
            query = whole[:, None] | ~held | (state.ids != past.seen)
            plans[stream] = plan_rows(state, query & state.batch.valid & state.users[stream][:, None], shown)
        own = plans.pop(0)
        return own.with_streams(plans) if plans else own
