"""`RefreshPolicy`: decides what each pass recomputes. A cache is a policy; the sampler does not know which.

`Policy` keeps what all of them need, for every guidance stream and row apart: a row in a batch does what it does alone. A
cache says in `plan_stream` what the rows of one stream recompute.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from unidiff.decoding.row_decode import RowDecode, RowMoment, RowWork, moments
from unidiff.decoding.state import DecodeState
from unidiff.models.denoiser import CachePlan, DenoiserTraits
from unidiff.models.store import StoreOptions
from unidiff.schema import check_value, field_types
from unidiff.tokens import TokenBatch

Compat = Literal["upstream"] | None
"""`upstream`: the behaviour of the reference implementation where it differs."""
Count = Callable[[Tensor], Tensor]
"""How many of n compared positions a layer recomputes, int64 `[B]` to `[B]`."""
Rate = Callable[[int], float]
"""FLOP/s of the model's matrix products at a number of rows."""


@runtime_checkable
class RefreshPolicy(Protocol):
    """What a decode asks of a cache; `Policy` says what each means."""

    @property
    def store(self) -> StoreOptions | None: ...

    @property
    def max_logits(self) -> str | None: ...

    @property
    def reads_shown(self) -> bool: ...

    @property
    def append_only(self) -> bool: ...

    def start(self, batch: TokenBatch, model: Any) -> RefreshPolicy: ...

    def plan(self, state: DecodeState, candidates: Tensor) -> CachePlan: ...

    def select(self, layer: int, similarity: Tensor) -> Tensor | None: ...

    def observe(self, state: DecodeState, plan: CachePlan) -> None: ...


class StreamPast(NamedTuple):
    """What the rows of a guidance stream did so far.

    passes: int64 `[B]`, those that the row had a use for. seen: int64 `[B, L]`, the ids in the last of them.
    notes: what the policy noted in its last plan of the stream.
    """

    passes: Tensor
    seen: Tensor
    notes: Mapping[str, Tensor]


@dataclass(frozen=True)
class StreamPlan:
    """What the rows of one guidance stream recompute in a pass. See `CachePlan` for `query`, `verify` and `full_layers`.

    Attributes:
        fresh: bool `[B]`, rows that recompute everything, apart from the others; None where `query` says that too.
        quota: how many of the compared positions are recomputed.
        notes: what the policy wants to know of the stream in its next pass.
    """

    query: Tensor
    fresh: Tensor | None = None
    verify: Tensor | None = None
    full_layers: tuple[int, ...] = ()
    quota: Count | None = None
    notes: Mapping[str, Tensor] = field(default_factory=dict)


class Policy:
    """A `RefreshPolicy` without anything to say. A cache is a dataclass, whose state fields have `init=False`.

    Attributes:
        store: what has to be kept between passes; None where no pass will be partial.
        max_logits: whether `state.max_logits` is kept: for the `candidates` of each pass, `everywhere`, or None.
        reads_shown: a position whose logits are shown was shown as well in the pass that computed it last.
        append_only: partial passes make sense although some positions were never computed (block-causal models).
        name: what `CacheConfig.policy` calls it; none where it is not made by name.
        whole_rows: it speaks for whole rows, and not for a segment of them.
        by_stream: streams differ even where their rows do the same.
        foretold: how many positions it recomputes and shows does not depend on the model's answers.
        auto: settings with which "auto" takes it for a `text`, an `image`, or what is given beside them (`prompt`).
    """

    name = ""
    store: StoreOptions | None = None
    max_logits: str | None = None
    append_only = reads_shown = whole_rows = by_stream = foretold = False
    auto: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    _past: dict[int, StreamPast]

    def __post_init__(self) -> None:
        check_settings(self)

    def start(self, batch: TokenBatch, model: Any) -> Self:
        """A policy of the same settings with fresh state, for one request.

        Raises:
            ValueError: the policy does not suit the model.
        """
        request = replace(self) if is_dataclass(self) else self
        request._past = {}
        return request

    @classmethod
    def exact_for(cls, traits: DenoiserTraits) -> bool:
        """Whether it changes nothing for such a model."""
        return False

    def begin_pass(self, state: DecodeState, candidates: Tensor) -> Tensor:
        """Before the streams are planned: what they share. Returns the candidates whose logits are shown, bool `[B, L]`."""
        return candidates

    def plan_stream(self, state: DecodeState, candidates: Tensor, stream: int, rows: Tensor) -> StreamPlan:
        """What the rows bool `[B]` that have a use for a stream recompute in it: everything, unless a cache knows better."""
        return StreamPlan(state.batch.valid & rows[:, None])

    def past(self, state: DecodeState, stream: int = 0) -> StreamPast:
        """What the rows of a stream did before this pass."""
        return self._past.get(stream) or StreamPast(torch.zeros_like(state.ids[:, 0]), state.ids, {})

    def plan(self, state: DecodeState, candidates: Tensor) -> CachePlan:
        """What the coming pass computes. Streams that did the same so far and serve the same rows share a plan, and run together.

        Args:
            state: the decode so far; `state.streams` are those that the pass may mix in, for rows `state.users`.
            candidates: bool `[B, L]`, positions whose logits the commit rules would like to see; a pass may have none.
        Returns:
            A plan made on the device without asking it: its sizes are read with all else that the host has to know.
            `query`: positions to recompute (others keep their last features; an empty one makes no pass);
            `logits`: candidates that may be committed now, None for all. `with_streams` for streams that differ.
        """
        shown = self.begin_pass(state, candidates)
        made: dict[object, tuple[CachePlan, StreamPast]] = {}
        found: dict[int, tuple[CachePlan, StreamPast]] = {}
        for stream in state.streams:
            alike = not self.by_stream and state.users[stream] is state.users[0]
            key = id(self._past.get(stream)) if alike else ("apart", stream)
            if key not in made:
                rows, past = state.users[stream], self.past(state, stream)
                own = self.plan_stream(state, candidates, stream, rows)
                seen = torch.where(rows[:, None], state.ids, past.seen)
                plan = CachePlan(own.query, shown, False, own.verify, own.full_layers, fresh=own.fresh, quota=own.quota)
                made[key] = plan, StreamPast(past.passes + rows.long(), seen, own.notes)
            found[stream] = made[key]
        self._past |= {stream: past for stream, (_, past) in found.items()}
        return CachePlan.joined({stream: plan for stream, (plan, _) in found.items()})

    def select(self, layer: int, similarity: Tensor) -> Tensor | None:
        """Positions bool `[B, L]` that a layer recomputes besides the query, given how alike new and stored values are
        at `plan.verify` `[B, L]` (NaN elsewhere). B counts the rows of all streams that run together."""
        return None

    def observe(self, state: DecodeState, plan: CachePlan) -> None:
        """After commit and remask: `state.just_unmasked` holds what the pass filled."""

    def row_work(self, decode: RowDecode, now: RowMoment, layers: int) -> RowWork:
        """What a pass computes in a row without guidance. (Index padding, where rows run together, is not in it.)

        Raises:
            ValueError: that depends on the model's answers, or nobody has said it.
        """
        raise ValueError(f"the work of {type(self).__name__} cannot be foretold; use a policy that defines row_work")

    def reference_bound(self, decode: RowDecode, traits: DenoiserTraits) -> float | None:
        """The closed formula of the paper for P prompt and G response tokens, S = P + G, n passes per block of B, if any."""
        return None


class NoCache(Policy):
    """Full passes, logits at the candidates."""

    name = "none"
    reads_shown = foretold = True

    def start(self, batch: TokenBatch, model: Any) -> Self:
        return self

    def plan(self, state: DecodeState, candidates: Tensor) -> CachePlan:
        return CachePlan(logits=candidates)

    def row_work(self, decode: RowDecode, now: RowMoment, layers: int) -> RowWork:
        return RowWork.even(layers, decode.length, decode.length, now.masked, now.ids)


class StoringPolicy(Policy):
    """Keeps keys and values. `rotated` (a setting): keys after rotary, the same result with less work per pass."""

    rotated: bool

    def __post_init__(self) -> None:
        super().__post_init__()
        self.store = StoreOptions(rotated=self.rotated)


def foretells(policy: RefreshPolicy) -> bool:
    """Whether a policy is `Policy.foretold`. Its own class has to say so: what inherits from it may do anything."""
    return bool(getattr(policy, "__dict__", {}).get("foretold", vars(type(policy)).get("foretold", False)))


def check_settings(policy: Any) -> None:
    """Raise `ValueError` unless the settings of a policy, a dataclass, have their declared types."""
    kind: Any = type(policy)
    types = field_types(kind)
    for f in fields(policy):
        if f.init:
            check_value(getattr(policy, f.name), types[f.name], f"{kind.__name__} {f.name}")


def expected_passes(policy: Policy, decode: RowDecode, layers: int, narrows: bool = False) -> list[RowWork]:
    """What each pass has to compute in a row without guidance, by a model that `narrows` (see `DenoiserTraits`) or not.

    Raises:
        ValueError: a policy whose work depends on the model's answers, or is not known.
    """
    found = [(moment, policy.row_work(decode, moment, layers)) for moment in moments(decode)]
    if not narrows or policy.max_logits == "everywhere":
        return [work for _, work in found]
    return [work.narrowed(moment.masked if policy.reads_shown else decode.targets) for moment, work in found]


def speedup_bound(policy: Policy, decode: RowDecode, traits: DenoiserTraits, rate: Rate | None = None) -> float:
    """Time without a cache over time with it, if all time were spent in matrix products.

    Args:
        traits: of the model.
        rate: FLOP/s at a number of rows, for the corrected bound; None takes the same for all numbers.
    """
    plain, cached = (
        sum(pass_seconds(p, traits, rate) for p in expected_passes(kind, decode, len(traits.layers), traits.narrows))
        for kind in (NoCache(), policy)
    )
    return plain / cached


def pass_seconds(work: RowWork, traits: DenoiserTraits, rate: Rate | None = None) -> float:
    """FLOPs of a pass over the rate at the rows of each product; attention counts at the rate of its query rows."""
    at = (lambda rows: 1.0) if rate is None else rate
    total = traits.head_flops(work.head, work.ids) / at(work.head) if work.head else 0.0
    for layer, w in zip(traits.layers, work.layers, strict=True):
        parts = (
            (w.k, layer.key),
            (w.v, layer.value),
            (w.out, layer.asking + work.keys * layer.pair),
        )
        total += sum(rows * each / at(rows) for rows, each in parts if rows)
    return total
