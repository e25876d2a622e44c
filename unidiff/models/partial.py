"""A forward over any set of query positions against stored features: what every decoding cache is made of.

Features of a position that is not recomputed are those of an earlier pass. Keys and values alone suffice where a pass
recomputes the same positions in every layer (prefix and dual caches, Fast-dLLM, arXiv 2505.22618). A store with
`outputs` also keeps what the branches add to the residual stream, so that every layer may recompute other positions
(dLLM-Cache, arXiv 2506.06295). All state lives in the store, which belongs to a request.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from unidiff.models.block import (
    AttentionMask,
    Block,
    Condition,
    Modulation,
    RotaryTables,
    gather_rows,
    modulate,
    rotate,
)
from unidiff.models.denoiser import CachePlan, LayerWork, PartialHidden, Select
from unidiff.models.store import FeatureStore

ATTENTION, FEED_FORWARD = range(2)  # branches of a block, in the order in which a store keeps their outputs


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


class BlockModel(Protocol):
    """What a pass over some positions runs: blocks, and what comes before and behind them; `MaskedTransformer` has it."""

    @property
    def blocks(self) -> Any: ...

    def embed(self, ids: Tensor, modality: Tensor, grid_index: Tensor | None = None) -> Tensor: ...

    def condition(self, modality: Tensor, time: Tensor | None) -> Condition | None: ...

    def finish(self, x: Tensor, condition: Condition | None) -> Tensor: ...


@torch.no_grad()
def partial_hidden(
    model: BlockModel,
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
        _narrow(model, ids[rows], part.everywhere(), True, part, None if time is None else time[rows])
        store.put(rows, part)
        rest = replace(plan, query=plan.query & ~plan.fresh[:, None], fresh=None)
        return replace(partial_hidden(model, ids, rest, store, time, select), fresh=len(rows))
    if plan.full or not store.options.outputs:
        whole = plan.query is None  # as a full plan has it
        index = store.everywhere() if plan.query is None else query_index(plan.query, plan.width)
        return _narrow(model, ids, index, whole, store, time)
    return _layered(model, ids, plan, store, time, select)


def _narrow(
    model: BlockModel, ids: Tensor, index: Tensor, whole: bool, store: FeatureStore, time: Tensor | None
) -> PartialHidden:
    """The same positions in every layer: the residual stream holds them alone."""
    condition, inputs = model.condition(store.inputs["modality"], time), store.inputs
    if not whole:
        ids, inputs = ids.gather(1, index.clamp_max(ids.shape[1] - 1)), store.inputs_at(index)
        condition = None if condition is None else condition.at(index)
    x = model.embed(ids, inputs["modality"], inputs.get("grid_index"))  # [B, n, D]
    store.begin(index, whole)
    n = index.shape[1]
    if not n:
        return PartialHidden(store.hidden[:, :0], index, (LayerWork(0, 0, 0),) * len(model.blocks))
    mask, rotary = store.visible(None if whole else index), _rotary_of(inputs)
    for layer, block in enumerate(model.blocks):
        x = block(x, rotary, mask, condition, SameView(store, layer, index, whole))
    x = model.finish(x, condition)
    store.write_hidden(index, whole, x)
    return PartialHidden(x, index, (LayerWork(n, n, n),) * len(model.blocks))


@dataclass
class SameView:
    """`LayerView` of a pass that computes the same positions, of one index, in every layer."""

    store: FeatureStore
    layer: int
    index: Tensor
    whole: bool

    def attention(self, block: Block, h: Tensor, rotary: RotaryTables, mask: AttentionMask) -> Tensor:
        if self.store.options.rotated:
            q, k, v = block.attention.project(h, rotary)
        else:
            q, k, v = block.attention.heads(h)
            q = rotate(q, rotary).to(v.dtype)
        self.store.write(self.layer, self.index, self.whole, key=k, value=v)
        return self._keep(ATTENTION, block.attended(q, *_seen(self.store, self.layer), mask))

    def feed_forward(self, block: Block, x: Tensor, modulation: Modulation | None) -> Tensor:
        return self._keep(FEED_FORWARD, block.fed(modulate(block.ffn_norm(x), modulation)))

    def _keep(self, branch: int, fresh: Tensor) -> Tensor:
        return self.store.output(self.layer, branch, self.index, self.whole, fresh)


def _layered(
    model: BlockModel, ids: Tensor, plan: CachePlan, store: FeatureStore, time: Tensor | None, select: Select | None
) -> PartialHidden:
    """Other positions in every layer: the residual stream holds all, with stored branch outputs where not recomputed."""
    x = model.embed(ids, store.inputs["modality"], store.inputs.get("grid_index"))  # [B, L, D]
    condition = model.condition(store.inputs["modality"], time)
    everywhere = store.everywhere()
    query = torch.ones_like(ids, dtype=torch.bool) if plan.query is None else plan.query
    known = everywhere if plan.query is None else query_index(plan.query, plan.width)
    compared = known if plan.verify is None else query_index(plan.verify | query, plan.compared)
    store.begin(known, plan.query is None)
    rotary, work = _rotary_of(store.inputs), []
    for layer, block in enumerate(model.blocks):
        view = OwnView(store, layer, plan, query, known, compared, select)
        x = block(x, rotary, None, condition, view)
        work.append(view.work)
    x = model.finish(x, condition)
    if (working := plan.working_rows()) is not None:  # with the time, hidden states of the others would change
        x = torch.where(working[:, None, None], x, store.hidden[:, :-1])
    store.write_hidden(everywhere, True, x)
    return PartialHidden(x, everywhere, tuple(work))


class OwnView:
    """`LayerView` of a pass in which every layer computes positions of its own.

    Args:
        query, known: bool `[B, L]`, what every layer computes, and its index. compared: index of `query` and what the plan
            verifies.
    """

    def __init__(
        self,
        store: FeatureStore,
        layer: int,
        plan: CachePlan,
        query: Tensor,
        known: Tensor,
        compared: Tensor,
        select: Select | None,
    ) -> None:
        self.store, self.layer, self.plan, self.select = store, layer, plan, select
        self._query, self._known, self._compared = query, known, compared
        self._whole, self._index = False, known

    def attention(self, block: Block, h: Tensor, rotary: RotaryTables, mask: AttentionMask) -> Tensor:
        store = self.store
        self._index, values = self._positions(block, h)
        self._whole = self._index is store.everywhere()
        n = self._index.shape[1]
        self.work = LayerWork(n, values.shape[1], n)
        if n:
            if not self._whole:
                h, rotary = store.gather(h, self._index), _rotary_of(store.inputs_at(self._index, "cos", "signed_sin"))
            q, k = block.attention.query_key(h)
            k = rotate(k, rotary).to(h.dtype) if store.options.rotated else k
            store.write(self.layer, self._index, self._whole, key=k)
            mask = store.visible(None if self._whole else self._index)
            fresh = block.attended(rotate(q, rotary).to(h.dtype), *_seen(store, self.layer), mask)
            store.output(self.layer, ATTENTION, self._index, self._whole, fresh)
        return store.all_outputs(self.layer, ATTENTION)

    def feed_forward(self, block: Block, x: Tensor, modulation: Modulation | None) -> Tensor:
        if self._index.shape[1]:
            if modulation is None:  # a norm of few positions
                h = block.ffn_norm(x if self._whole else gather_rows(x, self._index))
            else:
                h = modulate(block.ffn_norm(x), modulation)
                h = h if self._whole else gather_rows(h, self._index)
            self.store.output(self.layer, FEED_FORWARD, self._index, self._whole, block.fed(h))
        return self.store.all_outputs(self.layer, FEED_FORWARD)

    def _positions(self, block: Block, h: Tensor) -> tuple[Tensor, Tensor]:
        """Indices of what this layer recomputes, and of its new values, which are written."""
        store, plan, rows = self.store, self.plan, self.plan.refreshed_in(self.layer)
        if rows is True:
            self._write_values(block, h, store.everywhere())
            return store.everywhere(), store.everywhere()
        wanted, values, length, chosen_width = self._query, self._known, h.shape[1], plan.chosen
        if isinstance(rows, Tensor):  # these rows in full, the others as in any layer
            wanted, chosen_width = self._query | rows[:, None], length
            values = query_index(wanted, length)
        if plan.verify is None or self.select is None:
            self._write_values(block, h, values)
            return values, values
        values = self._compared if wanted is self._query else query_index(plan.verify | wanted, length)
        fresh = block.attention.value(store.gather(h, values))  # [B, n, KV, d]
        chosen = compare_values(fresh, self.layer, values, plan.verify, wanted, store, self.select)
        return query_index(chosen, chosen_width), values

    def _write_values(self, block: Block, h: Tensor, index: Tensor) -> None:
        if index.shape[1]:
            whole = index is self.store.everywhere()
            value = block.attention.value(h if whole else self.store.gather(h, index))
            self.store.write(self.layer, index, whole, value=value)


def compare_values(
    fresh: Tensor, layer: int, values: Tensor, verify: Tensor, query: Tensor, store: FeatureStore, select: Select
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


def _seen(store: FeatureStore, layer: int) -> tuple[Tensor, Tensor]:
    """Keys, rotated, and values of all positions, `[B, KV, L, d]`."""
    k = store.keys(layer)
    if not store.options.rotated:
        k = rotate(k.transpose(1, 2), _rotary_of(store.inputs)).to(k.dtype).transpose(1, 2)
    return k, store.values(layer)


def _rotary_of(inputs: Mapping[str, Tensor]) -> RotaryTables:
    return RotaryTables(inputs["cos"], inputs["signed_sin"])
