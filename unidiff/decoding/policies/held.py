"""Guidance intervals: unconditional streams that are not evaluated in every pass."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor

from unidiff.decoding.policies.base import Policy, check_whole
from unidiff.decoding.policies.rows import Past
from unidiff.decoding.state import DecodeState
from unidiff.models.partial import CachePlan


@dataclass(kw_only=True)
class HeldGuidance(Policy, ABC):
    """A policy whose streams plan by counters of their own, the unconditional ones in some passes only.

    In between, the difference of the logits (conditional - unconditional) is kept (dLLM-Cache, Liu et al. 2025,
    arXiv 2506.06295). A stream that left passes out makes up for what was written meanwhile when its turn comes.

    Args:
        guidance_interval: passes between two evaluations of the unconditional streams; 1 evaluates them in every pass.
            Counted for the batch.
        guidance_warmup: first passes, all of which evaluate the unconditional streams.

    Raises:
        ValueError: not a whole number, or too small.
    """

    guidance_interval: int = 1
    guidance_warmup: int = 5
    _passes: int = field(default=0, init=False, repr=False)
    _past: dict[int, Past] = field(default_factory=dict, init=False, repr=False)  # by stream

    def __post_init__(self) -> None:
        check_whole("guidance_interval", self.guidance_interval, 1)
        check_whole("guidance_warmup", self.guidance_warmup, 0)

    def renews_guidance(self, number: int) -> bool:
        """Whether the pass of this number, from 0, evaluates the unconditional streams."""
        return number % self.guidance_interval == 0 or number < self.guidance_warmup

    def plan(self, state: DecodeState, candidates: Tensor) -> CachePlan:
        """See `RefreshPolicy.plan`."""
        renew = self.renews_guidance(self._passes)
        self._passes += 1
        begin = self._past.get(0)
        own = self._stream_plan(0, state, candidates)
        others: dict[int, CachePlan | None] = {}
        for stream in state.streams:
            past = self._past.get(stream)
            if stream == 0:
                continue
            if past is not None and not renew:
                others[stream] = None
            elif past is begin and torch.equal(state.users[stream], state.users[0]):
                self._past[stream] = self._past[0]  # in step with the conditional stream: they run together
                if self.guidance_interval > 1:
                    others[stream] = own
            else:
                others[stream] = self._stream_plan(stream, state, candidates)
        return own.with_streams(others) if others else own

    @abstractmethod
    def _stream_plan(self, stream: int, state: DecodeState, candidates: Tensor) -> CachePlan:
        """What the rows of one stream recompute in their next pass, by their own counters in `_past`."""
