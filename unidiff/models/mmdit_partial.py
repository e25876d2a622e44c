"""A forward of the MM-DiT over any text tokens and cells of codes against stored features: see `unidiff.models.partial`.

A store's positions are the tokens that the blocks see: T of text, then N cells of the image, which are computed whole. What it
keeps at the end of the blocks is ready for the heads: the text's features, and behind a cell those of each of its codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from unidiff.models.block import Condition, gather_rows
from unidiff.models.denoiser import CachePlan, LayerWork, Select
from unidiff.models.mmdit import MMDiT
from unidiff.models.mmdit_blocks import AxisTables, Streams, WholeView, attended, fed, joined, turn
from unidiff.models.partial import check_plan, compare_values, query_index
from unidiff.models.store import FeatureStore, StoreLayout, StoreOptions


class MMDiTInputs(NamedTuple):
    """What the blocks read in a pass.

    Attributes:
        text: float `[B, T, text_dim]`, features of the text encoder. cells: int64 `[B, N, c]`, see `MMDiT.cells`.
        condition: of the rows.
    """

    text: Tensor
    cells: Tensor
    condition: Condition

    def rows(self, rows: Tensor) -> MMDiTInputs:
        """Some rows, int64 `[n]`."""
        return MMDiTInputs(self.text[rows], self.cells[rows], Condition(self.condition.vector[rows]))


class _Index(NamedTuple):
    """Positions int64 `[B, n]`, the first `split` of each row in the text; T + N on padding. all: every position."""

    at: Tensor
    split: int
    all: bool = False


def mmdit_store(
    model: MMDiT, rows: int, text_length: int, size: tuple[int, int], options: StoreOptions | None = None
) -> FeatureStore:
    """Empty features for rows of a text and a grid of codes. Keys are kept after rotary, whatever the options say."""
    device, config, heads = model.device, model.config, model.config.num_heads
    tables = model.rotary(text_length, size, device)
    inputs = {name: x.expand(rows, -1, -1, -1).contiguous() for name, x in tables._asdict().items()}
    branches = (2,) * len(model.double_blocks) + (1,) * len(model.single_blocks)
    width = heads * config.head_dim
    layout = StoreLayout(heads, config.head_dim, width, branches, width * model.cell_side**2)
    like = model.embed_text.weight.new_empty(0, device=device)
    return FeatureStore(layout, (rows, len(tables.cos)), like, options, inputs=inputs)


@torch.no_grad()
def partial_mmdit(
    model: MMDiT, inputs: MMDiTInputs, plan: CachePlan, store: FeatureStore, select: Select | None = None
) -> tuple[tuple[LayerWork, ...], int]:
    """Recompute the tokens of a plan over `[B, T + N]`; returns the work of each layer, and how many rows were `fresh`."""
    check_plan(plan, store, select)
    if plan.fresh is not None and plan.query is not None:
        rows = plan.fresh.nonzero().flatten()
        part = store.take(rows)
        partial_mmdit(model, inputs.rows(rows), CachePlan(), part)
        store.put(rows, part)
        rest = replace(plan, query=plan.query & ~plan.fresh[:, None], fresh=None)
        return partial_mmdit(model, inputs, rest, store, select)[0], len(rows)
    if store.options.outputs:
        return _layered(model, inputs, plan, store, select), 0
    return _narrow(model, inputs, None if plan.full else plan.query, store), 0


def _narrow(model: MMDiT, inputs: MMDiTInputs, query: Tensor | None, store: FeatureStore) -> tuple[LayerWork, ...]:
    """The same tokens in every layer."""
    text, cells, condition = inputs
    index, length = _everything(store, text), text.shape[1]
    rotary = AxisTables(**store.inputs)
    if query is not None:
        index = _index(query, length)
        text = gather_rows(text, index.at[:, : index.split])
        cells = gather_rows(cells, (index.at[:, index.split :] - length))
        rotary = AxisTables(**store.inputs_at(index.at))
    store.begin(index.at, index.all)
    count = index.at.shape[1]
    if count:
        views = [SameTokens(rotary, store, layer, index) for layer in range(model.num_blocks)]
        x = model.run_blocks(model.read_text(text), model.read_codes(cells), condition, views)
        store.write_hidden(index.at, index.all, _finish(model, x, index.split))
    return (LayerWork(count, count, count),) * model.num_blocks


@dataclass
class SameTokens(WholeView):
    """`StreamView` of a pass that computes the same tokens, of one index, in every layer."""

    store: FeatureStore
    layer: int
    index: _Index

    def seen(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        self.store.write(self.layer, self.index.at, self.index.all, key=key, value=value)
        return self.store.keys(self.layer), self.store.values(self.layer)


def _layered(
    model: MMDiT, inputs: MMDiTInputs, plan: CachePlan, store: FeatureStore, select: Select | None
) -> tuple[LayerWork, ...]:
    """Other tokens in every layer: the residual stream holds all, with stored branch outputs where not recomputed."""
    everything, length = _everything(store, inputs.text), inputs.text.shape[1]
    known = everything if plan.query is None else _index(plan.query, length)
    query = torch.ones_like(everything.at, dtype=torch.bool) if plan.query is None else plan.query
    store.begin(known.at, known.all)
    views = [OwnTokens(store, n, plan, query, known, everything, select) for n in range(model.num_blocks)]
    text, image = model.read_text(inputs.text), model.read_codes(inputs.cells)
    x = _finish(model, model.run_blocks(text, image, inputs.condition, views), length)
    if (working := plan.working_rows()) is not None:  # with the time, hidden states of the others would change
        x = torch.where(working[:, None, None], x, store.hidden[:, :-1])
    store.write_hidden(everything.at, True, x)
    return tuple(LayerWork(n := view.index.at.shape[1], view.values.at.shape[1], n) for view in views)


@dataclass
class OwnTokens:
    """`StreamView` of a pass in which every layer computes tokens of its own.

    Attributes:
        query, known: bool `[B, T + N]`, what every layer computes, and its index. everything: the index of all tokens.
        index, values: what this layer computed, and where it renewed values.
    """

    store: FeatureStore
    layer: int
    plan: CachePlan
    query: Tensor
    known: _Index
    everything: _Index
    select: Select | None

    def attention(self, streams: Streams, entered: Sequence[Tensor]) -> Sequence[Tensor]:
        store, h = self.store, joined(entered)  # [B, T + N, D]
        self._choose(streams, h)
        if self.index.at.shape[1]:
            own = self._own(h, self.index, streams)
            both = zip(*(stream.heads.query_key(x) for stream, x in zip(streams, own, strict=True)), strict=True)
            rotary = AxisTables(**(store.inputs if self.index.all else store.inputs_at(self.index.at)))
            q, k = (turn(joined(part), rotary) for part in both)  # [B, n, H, d]
            store.write(self.layer, self.index.at, self.index.all, key=k)
            self._keep(0, attended(streams, q, store.keys(self.layer), store.values(self.layer), own))
        return self._all(0, entered)

    def feed_forward(self, streams: Streams, entered: Sequence[Tensor]) -> Sequence[Tensor]:
        if self.index.at.shape[1]:
            self._keep(1, fed(streams, self._own(joined(entered), self.index, streams)))
        return self._all(1, entered)

    def _choose(self, streams: Streams, h: Tensor) -> None:
        """New values, and from them which tokens to recompute."""
        plan, rows, length = self.plan, self.plan.refreshed_in(self.layer), self.everything.split
        wanted = self.query if isinstance(rows, bool) else self.query | rows[:, None]
        self.index = self.everything if rows is True else self.known if wanted is self.query else _index(wanted, length)
        verify = None if rows is True or self.select is None else plan.verify
        self.values = self.index if verify is None else _index(verify | wanted, length)
        own = self._own(h, self.values, streams)
        fresh = joined([stream.heads.value(x) for stream, x in zip(streams, own, strict=True)])
        if verify is None or self.select is None:
            self.store.write(self.layer, self.values.at, self.values.all, value=fresh)
            return
        chosen = compare_values(fresh, self.layer, self.values.at, verify, wanted, self.store, self.select)
        self.index = _index(chosen, length)

    def _own(self, h: Tensor, index: _Index, streams: Streams) -> tuple[Tensor, ...]:
        """The tokens of an index by stream."""
        x = h if index.all else self.store.gather(h, index.at)
        return x.split((index.split, x.shape[1] - index.split), dim=1) if len(streams) == 2 else (x,)

    def _keep(self, branch: int, outputs: Sequence[Tensor]) -> None:
        self.store.output(self.layer, branch, self.index.at, self.index.all, joined(outputs))

    def _all(self, branch: int, entered: Sequence[Tensor]) -> Sequence[Tensor]:
        return self.store.all_outputs(self.layer, branch).split([h.shape[1] for h in entered], dim=1)


def _index(where: Tensor, text_length: int) -> _Index:
    """Of a flag bool `[B, T + N]`."""
    text, image = where.split((text_length, where.shape[1] - text_length), dim=1)
    widths = torch.stack([text.sum(1).max(), image.sum(1).max()]).tolist()
    words = query_index(text, widths[0])
    words = torch.where(words < text_length, words, where.shape[1])  # padding is behind the whole row
    return _Index(torch.cat((words, query_index(image, widths[1]) + text_length), dim=1), widths[0])


def _everything(store: FeatureStore, text: Tensor) -> _Index:
    return _Index(store.everywhere(), text.shape[1], True)


def _finish(model: MMDiT, joined: Tensor, split: int) -> Tensor:
    """`[B, n, D]` behind the blocks to `[B, n, c D]`, ready for the heads; the text's own D come first, then zeros."""
    text, image = joined[:, :split], model.leave_cells(joined[:, split:]).flatten(2)
    return torch.cat((F.pad(text, (0, image.shape[2] - text.shape[2])), image), dim=1)
