"""A forward over any set of query positions against stored features: what every decoding cache is made of.

Features of a position that is not recomputed are those of an earlier pass. Keys and values alone suffice where a pass
recomputes the same positions in every layer (prefix and dual caches, Fast-dLLM, arXiv 2505.22618). A store with
`outputs` also keeps what the branches add to the residual stream, so that every layer may recompute other positions
(dLLM-Cache, arXiv 2506.06295). All state lives in the store, which belongs to a request.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from unidiff.models.attention import attend
from unidiff.models.conditioning import Condition, Modulation, modulate
from unidiff.models.rotary import RotaryTables, rotate
from unidiff.models.store import FeatureStore, gather_rows

if TYPE_CHECKING:
    from unidiff.models.layers import Norm
    from unidiff.models.transformer import Block, MaskedTransformer

Select = Callable[[int, Tensor], Tensor | None]
ATTENTION, FEED_FORWARD = range(2)  # branches of a block, in the order in which a store keeps their outputs


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
            there are is padding, which changes nothing.
        compared, chosen: the same for what a layer compares (`query` and `verify` together) and for what it recomputes
            after `select`.
        fresh: bool `[B]`, rows that recompute all their positions, whatever `query` says of them. Rows that do much go
            apart from rows that do little, so that none of these pays for the padding.
        others: what guidance streams do that do not follow this plan; see `with_streams`.
        every_row: finished rows are computed as well, for those who look at features.
        rows: bool `[B]`, of a guidance stream: rows that are evaluated in this pass. The others keep their difference
            from the conditional logits, see `with_streams`. None for all.
    """

    query: Tensor | None = None
    logits: Tensor | None = None
    full: bool = True
    verify: Tensor | None = None
    full_layers: tuple[int, ...] = ()
    width: int | None = None
    compared: int | None = None
    chosen: int | None = None
    fresh: Tensor | None = None
    others: Mapping[int, CachePlan | None] = field(default_factory=dict)
    every_row: bool = False
    full_rows: Tensor | None = None
    rows: Tensor | None = None

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

        None leaves a stream out of the pass: its difference from the conditional logits stays what it was when it was
        last evaluated.
        """
        return replace(self, others=dict(others))

    def of(self, stream: int) -> CachePlan | None:
        """What a stream does; the conditional one is 0."""
        return self.others.get(stream, self)

    def working_rows(self) -> Tensor | None:
        """bool `[B]`: rows in which anything is recomputed; None where that is said of all."""
        if self.query is None or (self.full_layers and self.full_rows is None):
            return None
        rows = self.query.any(1)
        if self.verify is not None:
            rows = rows | self.verify.any(1)
        return rows if self.full_rows is None else rows | self.full_rows.any(0)

    def refreshed_in(self, layer: int) -> Tensor | bool:
        """Whether a layer recomputes every position: in all rows, in none, or in those of a bool `[B]`."""
        if layer not in self.full_layers or self.full_rows is None:
            return self.query is None or layer in self.full_layers
        return self.full_rows[self.full_layers.index(layer)]


@dataclass(frozen=True)
class LayerWork:
    """Positions per row that one layer sent through its matrices, padding of the index included."""

    qk: int
    v: int
    out: int


@dataclass(frozen=True)
class PartialHidden:
    """What a pass computed.

    Attributes:
        hidden: `[B, n, D]`, final hidden states ready for the head. (The store keeps them for all positions.)
        index: int64 `[B, n]`, their positions; L on padding of the index, and in rows that were computed afresh.
        work: one entry per layer.
        fresh: rows that were computed afresh.
    """

    hidden: Tensor
    index: Tensor
    work: tuple[LayerWork, ...]
    fresh: int = 0


def query_index(query: Tensor, width: int | None = None) -> Tensor:
    """Positions of bool `[B, L]` as int64 `[B, n]`, ascending; L where a row has fewer than n."""
    if width is None:
        width = int(query.sum(1).max())
    length = query.shape[1]
    places = torch.where(query, torch.arange(length, device=query.device), length)  # [B, L]
    return places.sort(dim=1).values[:, :width]


def check_plan(plan: CachePlan, store: FeatureStore, select: Select | None) -> None:
    """Raise `ValueError` where a plan needs more than the store keeps, or `select`."""
    if (plan.verify is not None or plan.full_layers) and not store.options.outputs:
        raise ValueError("this CachePlan verifies or refreshes layer by layer; make the store with outputs=True")
    if plan.verify is not None and select is None:
        raise ValueError("a CachePlan with verify needs `select`, which names the positions that a layer recomputes")


@torch.no_grad()
def partial_hidden(
    model: MaskedTransformer,
    ids: Tensor,
    plan: CachePlan,
    store: FeatureStore,
    time: Tensor | None = None,
    select: Select | None = None,
) -> PartialHidden:
    """See `PartialDenoiser.partial`."""
    if ids.shape != store.shape:
        raise ValueError(f"ids have shape {tuple(ids.shape)}; expected {tuple(store.shape)}, that of the store")
    check_plan(plan, store, select)
    if plan.fresh is not None and plan.query is not None:
        rows = plan.fresh.nonzero().flatten()
        part = store.take(rows)
        own = None if time is None else time[rows]
        _narrow(model, ids[rows], part.everywhere(), CachePlan(), part, own)
        store.put(rows, part)
        rest = replace(plan, query=plan.query & ~plan.fresh[:, None], fresh=None)
        return replace(partial_hidden(model, ids, rest, store, time, select), fresh=len(rows))
    if not (plan.full or store.options.outputs):
        index = store.everywhere() if plan.query is None else query_index(plan.query, plan.width)
        return _narrow(model, ids, index, plan, store, time)
    if plan.full:
        return _narrow(model, ids, store.everywhere(), plan, store, time)
    return _layered(model, ids, plan, store, time, select)


def _narrow(
    model: MaskedTransformer, ids: Tensor, index: Tensor, plan: CachePlan, store: FeatureStore, time: Tensor | None
) -> PartialHidden:
    """The same positions in every layer: the residual stream holds them alone."""
    whole = plan.full or plan.query is None
    condition, inputs = model.condition(store.inputs["modality"], time), store.inputs
    if not whole:
        ids, inputs = ids.gather(1, index.clamp_max(ids.shape[1] - 1)), store.inputs_at(index)
        condition = _condition_at(condition, index)
    rotary = RotaryTables(inputs["cos"], inputs["signed_sin"])
    x = model.embed(ids, inputs["modality"], inputs.get("spots"))  # [B, n, D]
    store.begin(index, whole)
    n = index.shape[1]
    if not n:
        return PartialHidden(store.hidden[:, :0], index, (LayerWork(0, 0, 0),) * len(model.blocks))
    mask = store.visible(None if whole else index)
    for layer, block in enumerate(_blocks(model)):
        first, second = (None, None) if block.ada_ln is None else block.ada_ln(condition)
        h = _enter(x, block.attention_norm, first)  # [B, n, D]
        if store.options.rotated:
            q, k, v = block.attention.project(h, rotary)
        else:
            q, k, v = block.attention.heads(h)
            q = rotate(q, rotary).to(v.dtype)
        store.write(layer, index, whole, key=k, value=v)
        h = _attend(block, q, layer, store, mask)
        x = x + _gated(store.output(layer, ATTENTION, index, whole, h), first if block.attention_gate else None)
        h = _leave(block.feed_forward(_enter(x, block.ffn_norm, second)), block.ffn_out_norm)
        x = x + _gated(store.output(layer, FEED_FORWARD, index, whole, h), second)
    x = model.finish(x, condition)
    store.write_hidden(index, whole, x)
    return PartialHidden(x, index, (LayerWork(n, n, n),) * len(model.blocks))


def _layered(
    model: MaskedTransformer,
    ids: Tensor,
    plan: CachePlan,
    store: FeatureStore,
    time: Tensor | None,
    select: Select | None,
) -> PartialHidden:
    """Other positions in every layer: the residual stream holds all, with stored branch outputs where not recomputed."""
    x = model.embed(ids, store.inputs["modality"], store.inputs.get("spots"))  # [B, L, D]
    condition = model.condition(store.inputs["modality"], time)
    everywhere, length = store.everywhere(), ids.shape[1]
    query = torch.ones_like(ids, dtype=torch.bool) if plan.query is None else plan.query
    known = everywhere if plan.query is None else query_index(plan.query, plan.width)
    compared = known if plan.verify is None else query_index(plan.verify | query, plan.compared)
    store.begin(known, plan.query is None)
    work = []
    for layer, block in enumerate(_blocks(model)):
        first, second = (None, None) if block.ada_ln is None else block.ada_ln(condition)
        h = _enter(x, block.attention_norm, first)  # [B, L, D]
        rows = plan.refreshed_in(layer)
        refreshed = rows is True
        index, values = everywhere, everywhere
        if refreshed:
            _write_values(block, h, layer, everywhere, store)
        else:
            wanted, values, chosen_width = query, known, plan.chosen
            if isinstance(rows, Tensor):  # these rows in full, the others as in any layer
                wanted, chosen_width = query | rows[:, None], length
                values = query_index(wanted, length)
            index = values
            if plan.verify is not None and select is not None:
                values = compared if wanted is query else query_index(plan.verify | wanted, length)
                fresh = block.attention.value(store.gather(h, values))  # [B, n, KV, d]
                chosen = compare_values(fresh, layer, values, plan.verify, wanted, store, select)
                index = query_index(chosen, chosen_width)
            else:
                _write_values(block, h, layer, values, store)
        if index.shape[1]:
            inputs = store.inputs if refreshed else store.inputs_at(index, "cos", "signed_sin")
            rotary = RotaryTables(inputs["cos"], inputs["signed_sin"])
            q, k = block.attention.query_key(h if refreshed else store.gather(h, index))
            keep = rotate(k, rotary).to(h.dtype) if store.options.rotated else k
            store.write(layer, index, refreshed, key=keep)
            mask = store.visible(None if refreshed else index)
            fresh = _attend(block, rotate(q, rotary).to(h.dtype), layer, store, mask)
            store.output(layer, ATTENTION, index, refreshed, fresh)
        x = x + _gated(store.all_outputs(layer, ATTENTION), first if block.attention_gate else None)
        if index.shape[1]:
            entered = _enter(x, block.ffn_norm, second, None if refreshed else index)
            fresh = _leave(block.feed_forward(entered), block.ffn_out_norm)
            store.output(layer, FEED_FORWARD, index, refreshed, fresh)
        x = x + _gated(store.all_outputs(layer, FEED_FORWARD), second)
        work.append(LayerWork(index.shape[1], values.shape[1], index.shape[1]))
    x = model.finish(x, condition)
    if (working := plan.working_rows()) is not None:  # with the time, hidden states of the others would change
        x = torch.where(working[:, None, None], x, store.hidden[:, :-1])
    store.write_hidden(everywhere, True, x)
    return PartialHidden(x, everywhere, tuple(work))


def _blocks(model: MaskedTransformer) -> list[Block]:
    return cast("list[Block]", list(model.blocks))


def compare_values(
    fresh: Tensor,
    layer: int,
    values: Tensor,
    verify: Tensor,
    query: Tensor,
    store: FeatureStore,
    select: Select,
) -> Tensor:
    """Put new values `[B, n, KV, d]` at `verify` and `query`, whose index is `values`; what to recompute, bool `[B, L]`."""
    similarity = cosine(fresh.flatten(2), store.values_at(layer, values))
    store.write(layer, values, False, value=fresh)
    rows, length = query.shape
    spread = similarity.new_full((rows, length + 1), torch.nan).scatter(1, values, similarity)[:, :-1]
    chosen = select(layer, torch.where(verify & ~query, spread, torch.nan))
    return query if chosen is None else query | (chosen & verify)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine over the last dimension in float32 (float64 inputs stay): `[..., D]` to `[...]`."""
    dtype = torch.float64 if a.dtype == torch.float64 else torch.float32
    return F.cosine_similarity(a.to(dtype), b.to(dtype), dim=-1)


def _write_values(block: Block, h: Tensor, layer: int, index: Tensor, store: FeatureStore) -> None:
    if index.shape[1]:
        whole = index is store.everywhere()
        store.write(layer, index, whole, value=block.attention.value(h if whole else store.gather(h, index)))


def _attend(block: Block, q: Tensor, layer: int, store: FeatureStore, mask: Tensor | None) -> Tensor:
    """Attention branch output `[B, n, D]` of rotated queries `[B, n, H, d]` against the whole store."""
    k = store.keys(layer)
    if not store.options.rotated:
        tables = RotaryTables(*(store.inputs[name].transpose(1, 2) for name in ("cos", "signed_sin")))  # [B, 1, L, d]
        k = rotate(k, tables).to(k.dtype)
    mixed = attend(q.transpose(1, 2), k, store.values(layer), mask)  # [B, H, n, d]
    return _leave(block.attention.out(mixed.transpose(1, 2).flatten(2)), block.attention_out_norm)


def _enter(x: Tensor, norm: Norm, modulation: Modulation | None, index: Tensor | None = None) -> Tensor:
    """Input of a branch, at the positions of an index or at all."""
    if modulation is None:
        return norm(x if index is None else gather_rows(x, index))
    h = modulate(norm(x), modulation)
    return h if index is None else gather_rows(h, index)


def _leave(h: Tensor, norm: Norm | None) -> Tensor:
    return h if norm is None else norm(h)


def _gated(h: Tensor, modulation: Modulation | None) -> Tensor:
    return h if modulation is None else modulation.gate * h


def _condition_at(condition: Condition | None, index: Tensor) -> Condition | None:
    if condition is None or condition.shifted is None or condition.gated is None:
        return condition
    return Condition(condition.vector, gather_rows(condition.shifted, index), gather_rows(condition.gated, index))
