"""Guidance intervals: unconditional streams that are not evaluated in every pass, whatever the cache."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from unidiff.decoding.policies.base import Policy, RefreshPolicy, check_whole
from unidiff.decoding.state import DecodeState
from unidiff.models.partial import CachePlan
from unidiff.models.store import StoreOptions
from unidiff.tokens import TokenBatch


@dataclass
class HeldGuidance(Policy):
    """Evaluates the unconditional streams in some passes only; in between, logits (conditional - unconditional) are kept.

    After dLLM-Cache (Liu et al. 2025, arXiv 2506.06295), for any policy. A stream makes up for what was written meanwhile
    when its turn comes, by the policy's rules. With guidance, a pass that leaves one unconditional stream out costs
    half of one that does not.

    Args:
        policy: decides what a pass recomputes in the streams that it evaluates.
        interval: passes between two evaluations of the unconditional streams; 1 evaluates them in every pass. Counted
            for the batch.
        warmup: first passes, all of which evaluate them.

    Raises:
        ValueError: not a whole number, or too small; a policy that does this already.
    """

    policy: RefreshPolicy
    interval: int = 2
    warmup: int = 5
    _passes: int = field(default=0, init=False, repr=False)
    _known: set[int] = field(default_factory=set, init=False, repr=False)  # streams evaluated so far

    def __post_init__(self) -> None:
        check_whole("guidance_interval", self.interval, 1)
        check_whole("guidance_warmup", self.warmup, 0)
        if isinstance(self.policy, HeldGuidance):
            raise ValueError(
                "the policy inside of HeldGuidance is a HeldGuidance itself; give the policy that it holds"
            )

    @property
    def store(self) -> StoreOptions | None:  # type: ignore[override]
        return self.policy.store

    @property
    def peaks(self) -> str | None:  # type: ignore[override]
        return self.policy.peaks

    @property
    def appends(self) -> bool:  # type: ignore[override]
        return self.policy.appends

    def renews(self, number: int) -> bool:
        """Whether the pass of this number, from 0, evaluates the unconditional streams."""
        return number % self.interval == 0 or number < self.warmup

    def start(self, batch: TokenBatch, model: Any) -> HeldGuidance:
        """See `RefreshPolicy.start`."""
        return HeldGuidance(self.policy.start(batch, model), self.interval, self.warmup)

    def plan(self, state: DecodeState, candidates: Tensor) -> CachePlan:
        """See `RefreshPolicy.plan`."""
        renew = self.renews(self._passes)
        self._passes += 1
        now = tuple(s for s in state.streams if s == 0 or renew or s not in self._known)
        self._known |= set(now)
        own = self.policy.plan(replace(state, streams=now), candidates)
        others = {s: own.of(s) if s in now else None for s in state.streams if s != 0}
        return own.with_streams(others) if others and self.interval > 1 else own

    def select(self, layer: int, similarity: Tensor) -> Tensor | None:
        """See `RefreshPolicy.select`."""
        return self.policy.select(layer, similarity)

    def observe(self, state: DecodeState, plan: CachePlan) -> None:
        """See `RefreshPolicy.observe`."""
        self.policy.observe(state, plan)
