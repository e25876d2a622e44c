"""`Denoiser`: what training, scoring and decoding ask of a model, whatever its class."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from unidiff.models.store import FeatureStore, StoreOptions, Width
from unidiff.schema import short_value
from unidiff.tokens import TokenBatch

Select = Callable[[int, Tensor], Tensor | None]


@dataclass(frozen=True)
class CachePlan:
    """Which positions a pass recomputes and where logits are wanted.

    Attributes:
        query: bool `[B, L]`, positions whose features are recomputed in every layer; None for all of them.
        logits: bool `[B, L]`, positions whose logits the caller reads; None for all of them.
        full: True when every feature is computed afresh, so nothing stored from earlier passes is used.
        verify: bool `[B, L]`, positions whose values every layer recomputes, replaces and compares with the stored ones;
            the caller's `select` then names those that the layer recomputes altogether. Needs a store with `outputs`.
        full_layers: layers that recompute every position. Needs a store with `outputs`.
        full_rows: bool `[len(full_layers), B]`, the rows in which each of them does so; None for all.
        width: most `query` positions in a row where the caller knows it; saves reading it from the device. More than
            there are is padding, which changes nothing. A pair counts before and behind the border of a store that has one.
        compared, chosen: the same for what a layer compares (`query` and `verify` together) and for what it recomputes
            after `select`. quota: how many of n compared positions that names at most, int64 `[B]` to `[B]`; None for all.
        fresh: bool `[B]`, rows that recompute all their positions, whatever `query` says of them. Rows that do much go
            apart from rows that do little, so that none of these pays for the padding.
        apart: how many rows are `fresh`, where the caller knows it.
        others: what guidance streams do that do not follow this plan; see `with_streams`.
        every_row: finished rows are computed as well, for those who look at features.
        rows: bool `[B]`, of a guidance stream: rows that are evaluated in this pass. The others keep their difference
            from the conditional logits, see `with_streams`. None for all.
        wanted: int64 `[B, m]`, ascending, L on padding: positions whose hidden states may be read before they are computed
            again. Of the others the last layer computes only what these look at. None for all.
    """

    query: Tensor | None = None
    logits: Tensor | None = None
    full: bool = True
    verify: Tensor | None = None
    full_layers: tuple[int, ...] = ()
    width: Width | None = None
    compared: Width | None = None
    chosen: Width | None = None
    quota: Callable[[Tensor], Tensor] | None = None
    fresh: Tensor | None = None
    apart: int | None = None
    others: Mapping[int, CachePlan | None] = field(default_factory=dict)
    every_row: bool = False
    full_rows: Tensor | None = None
    rows: Tensor | None = None
    wanted: Tensor | None = None

    def __post_init__(self) -> None:
        for name, positions in (("query", self.query), ("logits", self.logits), ("verify", self.verify)):
            if positions is not None and (positions.ndim != 2 or positions.dtype.is_floating_point):
                raise ValueError(
                    f"CachePlan.{name} has shape {tuple(positions.shape)} and dtype {positions.dtype}; expected bool [B, L]"
                )
        if self.full and not (self.query is self.verify is self.fresh is None and not self.full_layers):
            raise ValueError("a full CachePlan recomputes every position; leave all but logits out or set full=False")
        if self.fresh is not None and (self.query is None or self.verify is not None or self.full_layers):
            raise ValueError("CachePlan.fresh goes with query, and not with verify or full_layers")

    def with_streams(self, others: Mapping[int, CachePlan | None]) -> CachePlan:
        """This plan, with plans of their own for some guidance streams.

        None leaves a stream out of the pass: it keeps its difference from the conditional logits.
        """
        return replace(self, others=dict(others))

    @staticmethod
    def joined(plans: Mapping[int, CachePlan | None]) -> CachePlan:
        """The plan of all streams: that of the conditional one, with those of the others where they differ."""
        first = plans[0]
        assert first is not None  # no policy leaves the conditional stream out
        others = {stream: plan for stream, plan in plans.items() if plan is not first}
        return first.with_streams(others) if others else first

    def of(self, stream: int) -> CachePlan | None:
        """What a stream does; the conditional one is 0."""
        return self.others.get(stream, self)

    def recomputed(self, valid: Tensor) -> Tensor:
        """bool `[B, L]`: which of the `valid` positions every layer computes anew; what a layer chooses itself is not among them."""
        if self.full or self.query is None:
            return valid
        return valid & (self.query if self.fresh is None else self.query | self.fresh[:, None])

    def working_rows(self) -> Tensor | None:
        """bool `[B]`: rows in which anything is recomputed; None where that is said of all."""
        if self.query is None or (self.full_layers and self.full_rows is None):
            return None
        rows = self.query.any(1)
        if self.verify is not None:
            rows = rows | self.verify.any(1)
        return rows if self.full_rows is None else rows | self.full_rows.any(0)

    def by_whole_rows(self) -> CachePlan:
        """For models that cannot go layer by layer: rows that would do so recompute everything, others their query."""
        if self.query is None or (self.full_layers and self.full_rows is None):
            return CachePlan()
        deep = torch.zeros_like(self.query[:, 0])
        if self.verify is not None:
            deep = deep | (self.verify & ~self.query).any(1)
        if self.full_rows is not None:
            deep = deep | self.full_rows.any(0)
        return CachePlan(self.query | deep[:, None], self.logits, full=False, rows=self.rows)

    def stacks_with(self, other: CachePlan) -> bool:
        """Whether streams with these plans run as rows of one call.

        Plans that refresh layer by layer differ in size when they differ at all; joined, each would pay for the larger.
        """
        if self.full or other.full:
            return self.full and other.full
        if self.query is other.query and self.verify is other.verify and self.full_rows is other.full_rows:
            return (self.full_layers, self.width) == (other.full_layers, other.width)
        plain = all(p.verify is None and not p.full_layers and p.query is not None for p in (self, other))
        return plain and self.width == other.width

    @classmethod
    def stacked(cls, plans: Sequence[CachePlan]) -> CachePlan:
        """The plan of all rows, stream by stream, of plans that stack."""
        first, count = plans[0], len(plans)
        if first.full or count == 1:
            return first
        query = None if first.query is None else torch.cat([p.query for p in plans if p.query is not None])
        verify = None if first.verify is None else torch.cat([p.verify for p in plans if p.verify is not None])
        fresh = apart = None
        if query is not None and any(p.fresh is not None for p in plans):
            none = torch.zeros_like(query[: len(query) // count, 0])
            fresh = torch.cat([none if p.fresh is None else p.fresh for p in plans])
            counts = [0 if p.fresh is None else p.apart for p in plans]
            apart = None if None in counts else sum(n for n in counts if n is not None)
        full_rows = None if first.full_rows is None else first.full_rows.repeat(1, count)
        return replace(first, query=query, verify=verify, fresh=fresh, apart=apart, full_rows=full_rows, others={})

    def refreshed_in(self, layer: int) -> Tensor | bool:
        """Whether a layer recomputes every position: in all rows, in none, or in those of a bool `[B]`."""
        if layer not in self.full_layers or self.full_rows is None:
            return self.query is None or layer in self.full_layers
        return self.full_rows[self.full_layers.index(layer)]


@dataclass(frozen=True)
class LayerWork:
    """Positions per row that one layer sent through its matrices, padding of the index included."""

    k: int
    v: int
    out: int  # those that asked, and all that follows from it: queries, output projection, feed-forward


@dataclass(frozen=True)
class PartialHidden:
    """What a pass computed."""

    hidden: Tensor  # [B, n, D], final hidden states ready for the head; the store keeps them for all positions
    index: Tensor  # int64 [B, n], their positions; L on padding, where `wanted` is not computed, and in rows computed afresh
    work: tuple[LayerWork, ...]  # of each layer
    fresh: int = 0  # rows that were computed afresh


class Denoiser(Protocol):
    """Features of every position, and a head that can be sliced."""

    def hidden(
        self,
        ids: Tensor,
        modality: Tensor,
        positions: Tensor,
        attention_mask: Tensor | None,
        time: Tensor | None = None,
    ) -> Tensor:
        """ids, modality int64 `[B, L]`, positions int64 `[B, L, 3]`, mask bool `[B, 1, L, L]` -> `[B, L, D]`.

        `time` float `[B]` is diffusion time; a model without time conditioning ignores it. A model that takes continuous
        features has one more argument, `features` float `[B, L, D]`, which is given where a batch has them: the vectors to take
        in place of an embedding where the id is `CONTINUOUS`.
        """
        ...

    def head(self, hidden: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """`[..., D]` -> logits `[..., stop - start]` of the vocabulary slice."""
        ...


@dataclass(frozen=True)
class LayerFlops:
    """FLOPs of one token in one layer: of its linear layers by kind, and (`pair`) of attention for each key that it sees.

    A matrix product `[m, k] x [k, n]` counts 2 m k n. Embeddings, norms, rotary, biases, softmax and adaLN (once per row) are
    left out: they are far less, and no cache changes what they cost at the positions it computes.
    """

    query: int
    key: int
    value: int
    output: int
    feed_forward: int
    pair: int

    @property
    def token(self) -> int:
        """All linear layers together: c of the formulas."""
        return self.asking + self.key + self.value

    @property
    def asking(self) -> int:
        """Linear layers of a token besides its key and value."""
        return self.query + self.output + self.feed_forward

    def linear(self, work: LayerWork) -> int:
        """Linear layers of one row."""
        return work.k * self.key + work.v * self.value + work.out * self.asking

    def attention(self, work: LayerWork, keys: int) -> int:
        """Attention of one row, over `keys` keys."""
        return work.out * keys * self.pair


@dataclass(frozen=True)
class DenoiserTraits:
    """What decoding relies on besides a model's answers."""

    ids: int  # how many the model knows
    width: int  # D of the features
    layers: tuple[LayerFlops, ...]  # what each costs, in the order in which `PartialHidden.work` lists them
    affine_head: bool  # logits are affine in the features, so that a weighted sum of features gives that of logits
    block_length: int | None = None  # of block-causal attention; None where every position sees every other
    timed: bool = False  # features depend on the time
    codes_per_token: int = 1  # image codes that share one token of the layers, which are computed together
    narrows: bool = False  # knows `wanted`, also as the last argument of `hidden`, which then returns [B, m, D]
    recordable: bool = True  # a pass asks the device for nothing on its way, see `unidiff.decoding.graphs`

    def head_flops(self, positions: int, ids: int) -> int:
        """Logits of some positions over some ids."""
        return 2 * self.width * ids * positions


@runtime_checkable
class PartialDenoiser(Denoiser, Protocol):
    """A denoiser that can recompute some positions against stored features: what every cache needs to save work."""

    @property
    def traits(self) -> DenoiserTraits: ...

    def make_store(self, batch: TokenBatch, options: StoreOptions | None = None) -> FeatureStore:
        """Empty features for the rows of `batch`, whose layout is fixed from here on; ids do not matter."""
        ...

    def partial(
        self,
        ids: Tensor,
        plan: CachePlan,
        store: FeatureStore,
        time: Tensor | None = None,
        select: Select | None = None,
    ) -> PartialHidden:
        """Recompute the positions of a plan; the others keep the features that `store` holds of them.

        Every query sees what it would see in `hidden`, but never a position that no pass has computed yet.

        Args:
            ids: int64 `[B, L]`, current tokens.
            plan: a full plan, or one without `query`, equals `hidden` (before `shifted`).
            store: from `make_store` for the same rows; changed in place.
            time: as in `hidden`.
            select: with `plan.verify`: called in every layer that does not recompute everything as
                `select(layer, similarity)`, where `similarity` `[B, L]` is the cosine between new and stored values
                (float32 over the full width, NaN where not compared); returns bool `[B, L]`, positions that the layer
                recomputes besides the query, or None for no more.

        Raises:
            ValueError: ids of another shape than the store, or a plan that needs a store with outputs or `select`.
        """
        ...

    def shifted(self, hidden: Tensor, positions: Tensor) -> Tensor:
        """From the final hidden states `[B, L, D]` that a store keeps to the features that `head` takes."""
        ...


def takes_features(model: Any) -> bool:
    """Whether a denoiser takes vectors in place of tokens."""
    known = inspect.signature(model.hidden).parameters.values()
    return any(one.name == "features" or one.kind is one.VAR_KEYWORD for one in known)


def is_block_causal(model: Any) -> bool:
    """Whether a denoiser says that a position sees its own block and earlier ones alone."""
    return isinstance(model, PartialDenoiser) and model.traits.block_length is not None


def check_features(features: Any, ids: Tensor) -> None:
    """Raise `ValueError` unless a model returned features `[B, L, D]` for ids `[B, L]`."""
    good = isinstance(features, Tensor) and features.is_floating_point()
    if not good or features.ndim != 3 or features.shape[:2] != ids.shape:
        raise ValueError(f"the model's hidden returned {_kind(features)}; expected floats {[*ids.shape, 'D']}")


def check_head(logits: Any, features: Tensor, start: int, stop: int) -> None:
    """Raise `ValueError` unless a model's head returned a logit for each of the ids from `start` to before `stop`."""
    shape = [*features.shape[:-1], stop - start]
    if not isinstance(logits, Tensor) or not logits.is_floating_point() or list(logits.shape) != shape:
        raise ValueError(
            f"the model's head returned {_kind(logits)} for the ids {start} to {stop - 1}; expected floats {shape}"
        )


def _kind(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else short_value(value)
