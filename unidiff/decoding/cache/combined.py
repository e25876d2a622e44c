"""Several policies in one decode: per segment, per row, and guidance streams that are not evaluated in every pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, NamedTuple, Self

import torch
from torch import Tensor

from unidiff.decoding.cache.base import Count, NoCache, Policy, RefreshPolicy, foretells
from unidiff.decoding.row_decode import RowDecode, RowMoment, RowWork
from unidiff.decoding.state import DecodeState
from unidiff.models.denoiser import CachePlan
from unidiff.models.store import StoreOptions
from unidiff.schema import Between
from unidiff.tokens import Modality, TokenBatch

SEGMENTS = ("text", "image", "text_prompt", "image_prompt")


class Part(NamedTuple):
    """Positions bool `[B, L]` of a batch that follow one policy.

    rows: bool `[B]`, rows that have any; None for all. apart: other rows have no use for it. modality: whose targets and
    progress the policy sees; None for all.
    """

    policy: RefreshPolicy
    where: Tensor
    rows: Tensor | None = None
    apart: bool = False
    modality: Modality | None = None

    def view(self, state: DecodeState) -> DecodeState:
        """The decode as this part's policy sees it."""
        if self.apart and self.rows is not None:
            made = {id(rows): rows & self.rows for rows in state.users.values()}
            state = replace(state, users={stream: made[id(rows)] for stream, rows in state.users.items()})
        if self.modality is None:
            return state
        progress = {m: p for m, p in state.progress.items() if m == self.modality}
        given = state.batch.given | (state.batch.valid & ~self.where)
        return replace(state, batch=state.batch.replace(given=given), progress=progress)


class Combined(Policy):
    """Every part of a batch refreshes by its own policy; a pass recomputes the union of what they ask for."""

    whole_rows = True
    _parts: tuple[Part, ...] = ()

    @property
    def members(self) -> Sequence[RefreshPolicy]:
        """The policies, before a request."""
        return ()

    def __post_init__(self) -> None:
        """Features are kept as any of the policies needs them, and largest logits as the widest of them."""
        super().__post_init__()
        self.store = StoreOptions.all_of(policy.store for policy in self.members)
        asked = {policy.max_logits for policy in self.members}
        self.reads_shown = all(policy.reads_shown for policy in self.members)
        self.max_logits = next((kind for kind in ("everywhere", "candidates") if kind in asked), None)
        self.foretold = all(map(foretells, self.members))

    def plan(self, state: DecodeState, candidates: Tensor) -> CachePlan:
        plans, shown = [], torch.zeros_like(candidates)
        for part in self._parts:
            own = candidates & part.where
            plans.append(part.policy.plan(part.view(state), own))
            shown = shown | (own if plans[-1].logits is None else own & plans[-1].logits)
        made: dict[tuple[int, ...], CachePlan | None] = {}
        found: dict[int, CachePlan | None] = {}
        for stream in state.streams:
            own_plans, alike = [plan.of(stream) for plan in plans], state.users[stream] is state.users[0]
            key = (0 if alike else stream, *map(id, own_plans))  # streams that do the same share a plan and a call
            if key not in made:
                made[key] = self._merge(state, shown, stream, own_plans)
            found[stream] = made[key]
        return CachePlan.joined(found)

    def _merge(self, state: DecodeState, shown: Tensor, stream: int, plans: list[CachePlan | None]) -> CachePlan | None:
        """One plan of what all parts recompute in the rows that have a use for the stream, None where all leave it out.

        No position does what a part asks that it is not in.
        """
        busy = state.users[stream]
        query, verify = torch.zeros_like(shown), torch.zeros_like(shown)
        layers: dict[int, Tensor | None] = {}  # bool [B], rows that a layer recomputes in full; None for all
        held, evaluated, compared = False, torch.zeros_like(busy), list[tuple[Count | None, Tensor]]()
        for part, plan in zip(self._parts, plans, strict=True):
            held = held or plan is None or plan.rows is not None
            if plan is None:
                continue
            rows, where = part.rows, part.where
            if plan.rows is not None:
                rows = plan.rows if rows is None else rows & plan.rows
                where = where & rows[:, None]
            evaluated = evaluated | (True if rows is None else rows)
            if plan.query is not None:
                asked = plan.query if plan.fresh is None else plan.query | plan.fresh[:, None]
                query = query | (where & asked)
            else:
                query = query | where
            if plan.verify is not None:
                compared.append((plan.quota, plan.verify & where & busy[:, None]))
                verify = verify | compared[-1][1]
            for number, layer in enumerate(plan.full_layers):
                own = None if plan.full_rows is None else plan.full_rows[number]
                if rows is not None:
                    own = rows if own is None else rows & own
                before = layers.get(layer, torch.zeros_like(busy))
                layers[layer] = None if own is None or before is None else before | own
        if all(plan is None for plan in plans):
            return None
        full_rows = None
        if any(rows is not None for rows in layers.values()):
            full_rows = torch.stack([torch.ones_like(busy) if r is None else r for _, r in sorted(layers.items())])
        query = query & busy[:, None]

        def quota(_: Tensor) -> Tensor:
            counts = [(take, (own & ~query).sum(1)) for take, own in compared]
            return sum((n if take is None else take(n) for take, n in counts), torch.zeros_like(busy).long())

        return CachePlan(
            query,
            shown,
            False,
            verify if compared else None,
            tuple(sorted(layers)),
            quota=quota,
            full_rows=full_rows,
            rows=evaluated if held and stream else None,
        )

    def select(self, layer: int, similarity: Tensor) -> Tensor | None:
        """Each policy picks among the compared positions of its own part."""
        chosen = None
        for part in self._parts:
            where = part.where.repeat(len(similarity) // len(part.where), 1)  # rows of all streams in the call
            own = part.policy.select(layer, similarity.masked_fill(~where, torch.nan))
            if own is not None:
                chosen = own & where if chosen is None else chosen | (own & where)
        return chosen

    def observe(self, state: DecodeState, plan: CachePlan) -> None:
        for part in self._parts:
            part.policy.observe(part.view(state), plan)


@dataclass
class SegmentCache(Combined):
    """A cache per segment: given and generated text and image tokens of one decode under different policies.

    For example a long prompt every 20 passes, the block of the text in every pass, and the image tokens whose logits
    are low: `SegmentCache(text=DualCache(), image=MaxLogitCache(), text_prompt=IntervalCache(20), ...)`. Each policy
    sees the blocks, steps and candidates of its own modality only, so text and image do not compete in one ranking.
    Passes are counted by rows, whatever modality makes them. When one segment compares features layer by layer
    (`AdaptiveCache`), its `full_layers` are computed for all segments of the rows that have this one.

    Args:
        text, image: policies of the targets of either modality.
        text_prompt, image_prompt: policies of the given tokens.

    Raises:
        ValueError: a policy that speaks for whole rows: block-causal, modality-alternating, guidance intervals, segments.
    """

    text: RefreshPolicy = field(default_factory=NoCache)
    image: RefreshPolicy = field(default_factory=NoCache)
    text_prompt: RefreshPolicy = field(default_factory=NoCache)
    image_prompt: RefreshPolicy = field(default_factory=NoCache)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, policy in zip(SEGMENTS, self.members, strict=True):
            if policy.append_only or (isinstance(policy, Policy) and policy.whole_rows):
                raise ValueError(f"{type(policy).__name__} decides for whole rows and cannot be the policy of {name!r}")

    @property
    def members(self) -> Sequence[RefreshPolicy]:
        return [getattr(self, name) for name in SEGMENTS]

    def start(self, batch: TokenBatch, model: Any) -> Self:
        started = [policy.start(batch, model) for policy in self.members]
        request = type(self)(*started)
        known, parts = batch.valid & batch.given, []
        for policy, name in zip(started, SEGMENTS, strict=True):
            modality = Modality.TEXT if name.startswith("text") else Modality.IMAGE
            given = name.endswith("prompt")
            where = (known if given else batch.targets) & (batch.modality == modality)
            rows = where.any(1)
            if bool(rows.any()):
                parts.append(
                    Part(policy, where, None if bool(rows.all()) else rows, False, None if given else modality)
                )
        request._parts = tuple(parts)
        return request


@dataclass
class CacheByRow(Combined):
    """Every row has what its own policy gives it alone, for instance where "auto" takes another cache for each.

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

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(policy.append_only for policy in self.policies):
            raise ValueError("a block-causal cache is exact for every row; use it for all of them")
        kept = {policy.store.outputs for policy in self.policies if policy.store is not None}
        if len(kept) > 1 or len({policy.max_logits for policy in self.policies} - {None}) > 1:
            raise ValueError("the policies look at different features of a decode; give ones that look at the same")
        if bad := [i for i in self.choice if not 0 <= i < len(self.policies)]:
            raise ValueError(f"a row has policy {bad[0]}; expected numbers from 0 to {len(self.policies) - 1}")

    @property
    def members(self) -> Sequence[RefreshPolicy]:
        return self.policies

    def start(self, batch: TokenBatch, model: Any) -> Self:
        if len(self.choice) != len(batch.ids):
            raise ValueError(f"there are policies for {len(self.choice)} rows, but the batch has {len(batch.ids)}")
        request = type(self)([policy.start(batch, model) for policy in self.policies], self.choice)
        own = torch.tensor(list(self.choice), device=batch.ids.device)
        groups = [(request.policies[i], own == i) for i in sorted(set(self.choice))]
        request._parts = tuple(Part(p, rows[:, None].expand_as(batch.given), rows, True) for p, rows in groups)
        return request


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

    whole_rows = True
    policy: RefreshPolicy
    interval: Annotated[int, Between(1)] = 2
    warmup: Annotated[int, Between(0)] = 5
    _passes: Tensor = field(init=False, repr=False, compare=False)  # int64 [B], of the rows
    _known: dict[int, Tensor] = field(init=False, repr=False, compare=False)  # by stream, bool [B]: evaluated before

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.policy, HeldGuidance):
            raise ValueError(
                "the policy inside of HeldGuidance is a HeldGuidance itself; give the policy that it holds"
            )
        self.store, self.max_logits = self.policy.store, self.policy.max_logits
        self.append_only, self.foretold = self.policy.append_only, foretells(self.policy)

    def renews(self, number: int) -> bool:
        """Whether a row's pass of this number, from 0, evaluates the unconditional streams."""
        return number % self.interval == 0 or number < self.warmup

    def start(self, batch: TokenBatch, model: Any) -> Self:
        request = replace(self, policy=self.policy.start(batch, model))
        request._passes, request._known = torch.zeros_like(batch.ids[:, 0]), {}
        return request

    def plan(self, state: DecodeState, candidates: Tensor) -> CachePlan:
        passes = self._passes
        self._passes = passes + state.users[0].long()
        if self.interval == 1 or state.streams == (0,):
            return self.policy.plan(state, candidates)
        due, none = (passes % self.interval == 0) | (passes < self.warmup), torch.zeros_like(passes).bool()
        renewed = {s: state.users[s] & (due | ~self._known.get(s, none)) for s in state.streams if s}  # bool [B] each
        self._known |= {s: self._known.get(s, none) | rows for s, rows in renewed.items()}
        own = self.policy.plan(replace(state, users={0: state.users[0], **renewed}), candidates)
        others: dict[int, CachePlan | None] = {}
        for s, rows in renewed.items():
            plan = own.of(s)
            if plan is not None and plan.full:  # nothing of the other rows may change
                plan = CachePlan(torch.zeros_like(candidates), plan.logits, False, fresh=rows)
            others[s] = None if plan is None else replace(plan, rows=rows, others={})
        return own.with_streams(others)

    def select(self, layer: int, similarity: Tensor) -> Tensor | None:
        return self.policy.select(layer, similarity)

    def observe(self, state: DecodeState, plan: CachePlan) -> None:
        self.policy.observe(state, plan)

    def row_work(self, decode: RowDecode, now: RowMoment, layers: int) -> RowWork:
        """Of the conditional stream."""
        assert isinstance(self.policy, Policy)
        return self.policy.row_work(decode, now, layers)
