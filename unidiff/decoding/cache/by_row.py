"""Rows of one decode under different policies, for instance where "auto" takes another cache for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from unidiff.decoding.cache.base import Policy, RefreshPolicy, check_settings
from unidiff.decoding.cache.rows import Part, merged
from unidiff.decoding.state import DecodeState
from unidiff.models.partial import CachePlan
from unidiff.models.store import StoreOptions
from unidiff.tokens import TokenBatch


@dataclass
class CacheByRow(Policy):
    """Every row has what its own policy gives it alone; a pass is made for all of them.

    Args:
        policies: what there is to choose from.
        choice: for every row of the batch, which of them is its own.

    Raises:
        ValueError: a choice that is not there, or (at the start of a decode) another number of rows; policies that do not
            go together: a block-causal one, which is exact for all rows of its models, or ones for which different
            features are kept.
    """

    policies: Sequence[RefreshPolicy]
    choice: Sequence[int]
    _groups: tuple[tuple[Tensor, RefreshPolicy], ...] = field(default=(), init=False, repr=False)  # bool [B], policy

    def __post_init__(self) -> None:
        check_settings(self)
        if any(policy.append_only for policy in self.policies):
            raise ValueError("a block-causal cache is exact for every row; use it for all of them")
        kept = {policy.store.outputs for policy in self.policies if policy.store is not None}
        if len(kept) > 1 or len({policy.max_logits for policy in self.policies} - {None}) > 1:
            raise ValueError("the policies look at different features of a decode; give ones that look at the same")
        if bad := [i for i in self.choice if not 0 <= i < len(self.policies)]:
            raise ValueError(f"a row has policy {bad[0]}; expected numbers from 0 to {len(self.policies) - 1}")

    @property
    def store(self) -> StoreOptions | None:  # type: ignore[override]
        """What any of the policies needs."""
        return StoreOptions.all_of(policy.store for policy in self.policies)

    @property
    def max_logits(self) -> str | None:  # type: ignore[override]
        """What any of the policies needs."""
        return next((policy.max_logits for policy in self.policies if policy.max_logits is not None), None)

    def start(self, batch: TokenBatch, model: Any) -> CacheByRow:
        """See `RefreshPolicy.start`."""
        if len(self.choice) != len(batch.ids):
            raise ValueError(f"there are policies for {len(self.choice)} rows, but the batch has {len(batch.ids)}")
        request = CacheByRow([policy.start(batch, model) for policy in self.policies], self.choice)
        own = torch.tensor(list(self.choice), device=batch.ids.device)
        request._groups = tuple((own == i, request.policies[i]) for i in sorted(set(self.choice)))
        return request

    def plan(self, state: DecodeState, candidates: Tensor) -> CachePlan:
        """See `RefreshPolicy.plan`."""
        plans, shown = [], torch.zeros_like(candidates)
        for rows, policy in self._groups:
            users = {stream: busy & rows for stream, busy in state.users.items()}
            own = candidates & rows[:, None]
            plan = policy.plan(replace(state, users=users), own)
            plans.append(plan)
            shown = shown | (own if plan.logits is None else own & plan.logits)
        first, *others = (self._stream_plan(stream, state, shown, plans) for stream in state.streams)
        assert first is not None  # no policy leaves the conditional stream out
        return first.with_streams(dict(zip(state.streams[1:], others, strict=True))) if others else first

    def select(self, layer: int, similarity: Tensor) -> Tensor | None:
        """Each policy picks in its own rows."""
        chosen = None
        for rows, policy in self._groups:
            where = rows.repeat(len(similarity) // len(rows))[:, None]  # rows of all streams in the call
            own = policy.select(layer, similarity.masked_fill(~where, torch.nan))
            if own is not None:
                chosen = own & where if chosen is None else chosen | (own & where)
        return chosen

    def observe(self, state: DecodeState, plan: CachePlan) -> None:
        """See `RefreshPolicy.observe`."""
        for _, policy in self._groups:
            policy.observe(state, plan)

    def _stream_plan(
        self, stream: int, state: DecodeState, shown: Tensor, plans: Sequence[CachePlan]
    ) -> CachePlan | None:
        """What all rows do in one stream, None where all of them leave it out."""
        parts, held, evaluated = [], False, torch.zeros_like(state.users[stream])
        for (rows, _), of_all in zip(self._groups, plans, strict=True):
            plan = of_all.of(stream)
            held = held or plan is None or plan.rows is not None
            if plan is not None:
                now = rows if plan.rows is None else rows & plan.rows
                evaluated = evaluated | now
                parts.append(Part(now[:, None].expand_as(shown), plan, now))
        if not parts:
            return None
        plan = merged(state, shown, state.users[stream], parts)
        return replace(plan, rows=evaluated) if held and stream else plan
