"""`RefreshPolicy`: decides what each pass recomputes. A cache is a policy; the sampler does not know which."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any, Protocol, Self, runtime_checkable

from torch import Tensor

from unidiff.decoding.state import DecodeState
from unidiff.models.partial import CachePlan
from unidiff.models.store import StoreOptions
from unidiff.schema import check_arguments
from unidiff.tokens import TokenBatch

COMPAT = (None, "upstream")


@runtime_checkable
class RefreshPolicy(Protocol):
    """Settings, and in what `start` returns the state of one request."""

    @property
    def store(self) -> StoreOptions | None:
        """What has to be kept between passes; None where no pass will be partial."""
        ...

    @property
    def max_logits(self) -> str | None:
        """Whether `state.max_logits` is kept: for the `candidates` of each pass, `everywhere`, or None."""
        ...

    @property
    def append_only(self) -> bool:
        """True where partial passes make sense although some positions were never computed (block-causal models)."""
        ...

    def start(self, batch: TokenBatch, model: Any) -> RefreshPolicy:
        """A policy of the same settings with fresh state, for one request.

        Raises:
            ValueError: the policy does not suit the model.
        """
        ...

    def plan(self, state: DecodeState, candidates: Tensor) -> CachePlan:
        """What the coming pass computes.

        Args:
            state: the decode so far; `state.streams` are those that the pass mixes in.
            candidates: bool `[B, L]`, positions whose logits the commit rules would like to see.
        Returns:
            `query`: positions to recompute (others keep their last features; an empty one makes no pass);
            `logits`: candidates that may be committed now, None for all. `with_streams` for streams that differ.
        """
        ...

    def select(self, layer: int, similarity: Tensor) -> Tensor | None:
        """Positions bool `[B, L]` that a layer recomputes besides the query, given how alike new and stored values are
        at `plan.verify` `[B, L]` (NaN elsewhere). B counts the rows of all streams that run together."""
        ...

    def observe(self, state: DecodeState, plan: CachePlan) -> None:
        """After commit and remask: `state.just_unmasked` holds what the pass filled."""
        ...


class Policy:
    """Defaults of a `RefreshPolicy`. A dataclass whose state fields have `init=False` starts as a fresh copy."""

    store: StoreOptions | None = None
    max_logits: str | None = None
    append_only: bool = False

    def start(self, batch: TokenBatch, model: Any) -> Self:
        return replace(self) if is_dataclass(self) else self

    def select(self, layer: int, similarity: Tensor) -> Tensor | None:
        return None

    def observe(self, state: DecodeState, plan: CachePlan) -> None:
        return None


def check_settings(policy: Any) -> None:
    """Raise `ValueError` unless the settings of a policy, a dataclass, have their declared types."""
    values = {f.name: getattr(policy, f.name) for f in fields(policy) if f.init}
    check_arguments(type(policy), values, type(policy).__name__)


def check_whole(name: str, value: object, low: int) -> None:
    """Raise `ValueError` unless `value` is a whole number of at least `low`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise ValueError(f"{name} is {value!r}; expected a whole number of at least {low}")
