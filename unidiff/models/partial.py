"""A forward over any set of query positions against stored features: what every decoding cache is made of.

Features of a position that is not recomputed are those of an earlier pass. Keys and values alone suffice where a pass
recomputes the same positions in every layer (prefix and dual caches, Fast-dLLM, arXiv 2505.22618). A store with
`outputs` also keeps what the branches add to the residual stream, so that every layer may recompute other positions
(dLLM-Cache, arXiv 2506.06295). All state lives in the store, which belongs to a request.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from unidiff.models.block import Parts, Streams, View, WholeView, attended, joined
from unidiff.models.denoiser import CachePlan, LayerWork, PartialHidden, Select
from unidiff.models.parts import gather_rows, queries_of, rotate
from unidiff.models.store import FeatureStore, LayerFeatures, TokenIndex

ATTENTION, FEED_FORWARD = range(2)  # branches of a block, in the order in which a store keeps their outputs


class PassModel(Protocol):
    """What a model does in a pass: read the tokens of an index, run its layers with a view for each, and the final norm."""

    def __call__(self, rows: Tensor | None, store: FeatureStore, index: TokenIndex, views: Sequence[View]) -> Tensor:
        """Hidden states `[B, n, D]` as the store keeps them; of some `rows` int64 alone, whose store this is."""
        ...


@torch.no_grad()
def partial_pass(run: PassModel, plan: CachePlan, store: FeatureStore, select: Select | None = None) -> PartialHidden:
    """See `PartialDenoiser.partial`."""
    if (plan.verify is not None or plan.full_layers) and not store.options.outputs:
        raise ValueError("this CachePlan verifies or refreshes layer by layer; make the store with outputs=True")
    if plan.verify is not None and select is None:
        raise ValueError("a CachePlan with verify needs `select`, which names the positions that a layer recomputes")
    if plan.fresh is not None and plan.query is not None:
        count = int(plan.fresh.sum()) if plan.apart is None else plan.apart
        rows = (~plan.fresh).long().argsort(stable=True)[:count]
        part = store.take(rows)
        _even(run, rows, part, part.everywhere, None if plan.wanted is None else plan.wanted[rows])
        store.put(rows, part)
        rest = replace(plan, query=plan.query & ~plan.fresh[:, None], fresh=None)
        return replace(partial_pass(run, rest, store, select), fresh=count)
    known = store.everywhere if plan.query is None else store.index(plan.query, plan.width)
    if plan.full or not store.options.outputs:
        return _even(run, None, store, known, plan.wanted)
    return _uneven(run, plan, store, known, select)


def _even(
    run: PassModel, rows: Tensor | None, store: FeatureStore, index: TokenIndex, wanted: Tensor | None
) -> PartialHidden:
    """The same positions in every layer, in the last one some of them: the residual stream holds them alone."""
    last, n, asked = store.layers - 1, index.width, index
    store.begin(index)
    work = [LayerWork(n, n, n)] * (last + 1)
    if not n:
        return PartialHidden(store.hidden[:, :0], index.at, tuple(work))
    rotary, visible, rotated = store.rotary(index), store.visible(index), store.options.rotated
    _place(store, index, *("heads", "write")[: 1 + store.options.outputs])
    masks = [store.visible_in(layer, index, visible) for layer in range(last + 1)]
    views = [
        EvenView(rotary, mask, rotated, kept=store.layer(layer), index=index, asked=index)
        for layer, mask in enumerate(masks)
    ]
    if wanted is not None and wanted.shape[1] < n:
        left, asked = index.narrowed(wanted, store.shape[1])
        work[last] = LayerWork(n, n, asked.width)
        views[last] = replace(views[last], mask=queries_of(masks[last], left), left=left, asked=asked)
    x = run(rows, store, index, views)
    store.write_hidden(asked, x)
    return PartialHidden(x, asked.at, tuple(work))


def _place(store: FeatureStore, index: TokenIndex, *uses: str) -> None:
    """Work out what an index means in memory before the first layer, so that all layers find the same and share one program."""
    for use in () if index.whole else uses:
        store.place(index, use)


@dataclass(kw_only=True)
class EvenView(WholeView):
    """`View` of a pass that computes the same positions, of one index, in every layer; branches of those that are asked for."""

    kept: LayerFeatures
    index: TokenIndex
    asked: TokenIndex

    def seen(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        self.kept.write(self.index, key, value)
        return self.kept.seen()

    def attention(self, streams: Streams, entered: Parts) -> Parts:
        return self._keep(ATTENTION, super().attention(streams, entered))

    def feed_forward(self, streams: Streams, entered: Parts) -> Parts:
        return self._keep(FEED_FORWARD, super().feed_forward(streams, entered))

    def _keep(self, branch: int, outputs: Parts) -> Parts:
        if self.kept.outputs:
            self.kept.write_output(branch, self.asked, joined(outputs))
        return outputs


def _uneven(
    run: PassModel, plan: CachePlan, store: FeatureStore, known: TokenIndex, select: Select | None
) -> PartialHidden:
    """Other positions in every layer: the residual stream holds all, with stored branch outputs where not recomputed."""
    everywhere = store.everywhere
    query = torch.ones_like(everywhere.at, dtype=torch.bool) if plan.query is None else plan.query
    compared = known if plan.verify is None else store.index(plan.verify | query, plan.compared)
    store.begin(known)
    for index in (known, compared):
        _place(store, index, "read", "heads", "write")
    views = [UnevenView(store, layer, plan, query, known, compared, select) for layer in range(store.layers)]
    x = run(None, store, everywhere, views)
    if (working := plan.working_rows()) is not None:  # with the time, hidden states of the others would change
        x = torch.where(working[:, None, None], x, store.hidden[:, :-1])
    store.write_hidden(everywhere, x)
    work = tuple(LayerWork(view.index.width, view.values.width, view.asked.width) for view in views)
    return PartialHidden(x, everywhere.at, work)


@dataclass
class UnevenView:
    """`View` of a pass in which every layer computes positions of its own.

    A compiled layer sees nothing of the layer's number, so that all layers share one program; `select` alone is told it.

    Attributes:
        query, known: bool `[B, L]`, what every layer computes, and its index. compared: index of `query` and what the plan
            verifies.
        refreshed: see `CachePlan.refreshed_in`. wanted: int64 `[B, m]`, all that goes on behind the last layer; else None.
        index, values: where this layer renewed keys and values; asked: what it computed altogether.
    """

    store: FeatureStore
    layer: int
    plan: CachePlan
    query: Tensor
    known: TokenIndex
    compared: TokenIndex
    select: Select | None
    left: Tensor | None = None
    kept: LayerFeatures = field(init=False)
    refreshed: Tensor | bool = field(init=False)
    wanted: Tensor | None = field(init=False)
    index: TokenIndex = field(init=False)
    values: TokenIndex = field(init=False)
    asked: TokenIndex = field(init=False)

    def __post_init__(self) -> None:
        self.kept, self.refreshed = self.store.layer(self.layer), self.plan.refreshed_in(self.layer)
        self.wanted = self.plan.wanted if self.layer == self.store.layers - 1 else None

    def attention(self, streams: Streams, entered: Parts) -> Parts:
        store, h = self.store, joined(entered)  # [B, L, D]
        self._choose(streams, h)
        self.asked = self.index
        if self.index.width:
            own, rotary, mask = self._own(h, self.index, streams), store.rotary(self.index), store.visible(self.index)
            turns, asked = rotary, own
            if self.wanted is not None and self.wanted.shape[1] < self.index.width:
                place, self.asked = self.index.narrowed(self.wanted, store.shape[1])
                turns = None if rotary is None else rotary.at(place)
                mask, asked = queries_of(mask, place), [gather_rows(x, place) for x in own]
            found = (stream.heads(x, None, False, h) for stream, x, h in zip(streams, own, asked, strict=True))
            q, k = (joined(part) for part in zip(*found, strict=True))
            turned = rotate(k, rotary).to(h.dtype) if rotary is not None and store.options.rotated else k
            self.kept.write(self.index, key=turned)
            q = q if turns is None else rotate(q, turns).to(h.dtype)
            mixed = attended(streams, q, *self.kept.seen(), mask, asked)
            self._keep(ATTENTION, mixed)
        return self._all(ATTENTION, entered)

    def feed_forward(self, streams: Streams, entered: Parts) -> Parts:
        if self.asked.width:
            own = self._own(joined(entered), self.asked, streams)
            self._keep(FEED_FORWARD, [stream.fed(h) for stream, h in zip(streams, own, strict=True)])
        return self._all(FEED_FORWARD, entered)

    def _choose(self, streams: Streams, h: Tensor) -> None:
        """New values, and from them which positions to recompute."""
        store, plan, rows = self.store, self.plan, self.refreshed
        wanted, width, verify = self.query, plan.chosen, plan.verify
        self.values = store.everywhere if rows is True else self.known
        if isinstance(rows, Tensor):  # these rows in full, the others as in any layer
            wanted, width = self.query | rows[:, None], h.shape[1]
            self.values = store.index(wanted, width)
        if rows is True or verify is None or self.select is None:
            self.index = self.values
            if self.values.width:
                self.kept.write(self.values, value=self._values(streams, h))
            return
        self.values = self.compared if wanted is self.query else store.index(verify | wanted, h.shape[1])
        fresh = self._values(streams, h)  # [B, n, KV, d]
        similarity = cosine(fresh.flatten(2), self.kept.values_at(self.values))
        self.kept.write(self.values, value=fresh)
        spread = similarity.new_full((len(h), h.shape[1] + 1), torch.nan).scatter(1, self.values.at, similarity)[:, :-1]
        chosen = self.select(self.layer, torch.where(verify & ~wanted, spread, torch.nan))
        self.index = store.index(wanted if chosen is None else wanted | (chosen & verify), width)

    def _values(self, streams: Streams, h: Tensor) -> Tensor:
        own = self._own(h, self.values, streams)
        return joined([stream.heads.value(x) for stream, x in zip(streams, own, strict=True)])

    def _own(self, h: Tensor, index: TokenIndex, streams: Streams) -> Parts:
        """The tokens of an index by stream."""
        x = self.store.gather(h, index)
        return x.split((index.split, x.shape[1] - index.split), dim=1) if len(streams) > 1 else (x,)

    def _keep(self, branch: int, outputs: Parts) -> None:
        self.kept.write_output(branch, self.asked, joined(outputs))

    def _all(self, branch: int, entered: Parts) -> Parts:
        kept = self.kept.all_outputs(branch)
        return kept.split([h.shape[1] for h in entered], dim=1) if len(entered) > 1 else (kept,)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine over the last dimension in float32 (float64 inputs stay): `[..., D]` to `[...]`."""
    dtype = torch.float64 if a.dtype == torch.float64 else torch.float32
    return F.cosine_similarity(a.to(dtype), b.to(dtype), dim=-1)
