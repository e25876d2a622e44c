"""Guidance intervals: unconditional streams that are not evaluated in every pass, whatever the cache."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from unidiff.decoding.cache.base import Policy, RefreshPolicy, check_settings, check_whole
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
        interval: passes of a row between two evaluations of its unconditional streams; 1 evaluates them in every pass.
        warmup: first passes of a row, all of which evaluate them.

    Raises:
        ValueError: not a whole number, or too small; a policy that does this already.
    """

    policy: RefreshPolicy
    interval: int = 2
    warmup: int = 5
    _passes: Tensor | None = field(default=None, init=False, repr=False)  # int64 [B], passes of the rows
    _known: dict[int, Tensor] = field(
        default_factory=dict, init=False, repr=False
    )  # by stream, bool [B]: evaluated before

    def __post_init__(self) -> None:
        check_settings(self)
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
    def max_logits(self) -> str | None:  # type: ignore[override]
        return self.policy.max_logits

    @property
    def append_only(self) -> bool:  # type: ignore[override]
        return self.policy.append_only

    def renews(self, number: int) -> bool:
        """Whether a row's pass of this number, from 0, evaluates the unconditional streams."""
        return number % self.interval == 0 or number < self.warmup

    def start(self, batch: TokenBatch, model: Any) -> HeldGuidance:
        """See `RefreshPolicy.start`."""
        return HeldGuidance(self.policy.start(batch, model), self.interval, self.warmup)

    def plan(self, state: DecodeState, candidates: Tensor) -> CachePlan:
        """See `RefreshPolicy.plan`."""
        if self.interval == 1 or state.streams == (0,):
            self._passes = self._after(state)
            return self.policy.plan(state, candidates)
        passes = torch.zeros_like(state.ids[:, 0]) if self._passes is None else self._passes
        due = (passes % self.interval == 0) | (passes < self.warmup)
        self._passes = self._after(state)
        alive, none = state.unfinished, torch.zeros_like(due)
        renewed = {s: state.users[s] & (due | ~self._known.get(s, none)) for s in state.streams if s}  # bool [B] each
        flags = torch.stack([f for r in renewed.values() for f in (r.any(), (r | ~alive).all())]).tolist()
        some, every = (dict(zip(renewed, values, strict=True)) for values in (flags[::2], flags[1::2]))
        self._known |= {s: self._known.get(s, none) | rows for s, rows in renewed.items()}
        now = (0, *(s for s in renewed if some[s]))
        users = {0: state.users[0], **{s: renewed[s] for s in now if s}}
        own = self.policy.plan(replace(state, streams=now, users=users), candidates)
        others: dict[int, CachePlan | None] = dict.fromkeys(renewed)
        for s in now[1:]:
            plan = own.of(s)
            if plan is not None and plan.full and not every[s]:  # nothing of the other rows may change
                plan = CachePlan(torch.zeros_like(candidates), plan.logits, full=False, width=0, fresh=renewed[s])
            others[s] = None if plan is None else replace(plan, rows=renewed[s], others={})
        return own.with_streams(others)

    def _after(self, state: DecodeState) -> Tensor:
        """Passes of the rows once this one is made."""
        return state.users[0].long() + (0 if self._passes is None else self._passes)

    def select(self, layer: int, similarity: Tensor) -> Tensor | None:
        """See `RefreshPolicy.select`."""
        return self.policy.select(layer, similarity)

    def observe(self, state: DecodeState, plan: CachePlan) -> None:
        """See `RefreshPolicy.observe`."""
        self.policy.observe(state, plan)
