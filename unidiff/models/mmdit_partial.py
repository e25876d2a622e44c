"""A forward of the MM-DiT over any text tokens and cells of codes against stored features: see `unidiff.models.partial`.

A store's positions are the tokens that the blocks see: T of text, then N cells of the image, which are computed whole. What it
keeps at the end of the blocks is ready for the heads: the text's features, and behind a cell those of each of its codes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from unidiff.models.attention import attend
from unidiff.models.conditioning import Condition, Modulation, modulate
from unidiff.models.mmdit import MMDiT
from unidiff.models.mmdit_blocks import AxisTables, DoubleBlock, SingleBlock, Stream, plain_norm, turn
from unidiff.models.partial import CachePlan, LayerWork, Select, check_plan, compare_values, query_index
from unidiff.models.store import FeatureStore, StoreLayout, StoreOptions, gather_rows


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

    def parts(self, x: Tensor, streams: int) -> tuple[Tensor, ...]:
        """`[B, n, ...]` by stream."""
        return x.split((self.split, x.shape[1] - self.split), dim=1) if streams == 2 else (x,)


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

        def keep(layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
            store.write(layer, index.at, index.all, key=key, value=value)
            return store.keys(layer), store.values(layer)

        joined = model.run_blocks(model.read_text(text), model.read_codes(cells), condition, rotary, keep)
        store.write_hidden(index.at, index.all, _finish(model, joined, index.split))
    return (LayerWork(count, count, count),) * model.num_blocks


def _layered(
    model: MMDiT, inputs: MMDiTInputs, plan: CachePlan, store: FeatureStore, select: Select | None
) -> tuple[LayerWork, ...]:
    """Other tokens in every layer: the residual stream holds all, with stored branch outputs where not recomputed."""
    everything, length = _everything(store, inputs.text), inputs.text.shape[1]
    known = everything if plan.query is None else _index(plan.query, length)
    query = torch.ones_like(everything.at, dtype=torch.bool) if plan.query is None else plan.query
    parts: tuple[Tensor, ...] = (model.read_text(inputs.text), model.read_codes(inputs.cells))
    store.begin(known.at, known.all)
    work = []
    for layer, block in enumerate((*model.double_blocks, *model.single_blocks)):
        assert isinstance(block, DoubleBlock | SingleBlock)
        streams: tuple[Stream | SingleBlock, ...] = block.streams
        if len(streams) < len(parts):
            parts = (torch.cat(parts, dim=1),)
        modulations = [stream.ada_ln(inputs.condition) for stream in streams]
        h = _entered(parts, modulations, 0)  # [B, T + N, D]
        # 1. values, and from them which tokens to recompute
        rows = plan.refreshed_in(layer)
        wanted = query if isinstance(rows, bool) else query | rows[:, None]
        index = everything if rows is True else known if wanted is query else _index(wanted, length)
        compares = plan.verify is not None and select is not None and rows is not True
        values = _index(plan.verify | wanted, length) if compares and plan.verify is not None else index
        own = values.parts(_at(h, values, store), len(streams))
        fresh = torch.cat([stream.heads.value(x) for stream, x in zip(streams, own, strict=True)], dim=1)
        if compares and plan.verify is not None and select is not None:
            index = _index(compare_values(fresh, layer, values.at, plan.verify, wanted, store, select), length)
        else:
            store.write(layer, values.at, values.all, value=fresh)
        # 2. branches: attention, and where it is one of its own the feed-forward
        if index.at.shape[1]:
            own = index.parts(_at(h, index, store), len(streams))
            both = zip(*(stream.heads.query_key(x) for stream, x in zip(streams, own, strict=True)), strict=True)
            rotary = AxisTables(**(store.inputs if index.all else store.inputs_at(index.at)))
            q, k = (turn(torch.cat(part, dim=1), rotary) for part in both)  # [B, n, H, d]
            store.write(layer, index.at, index.all, key=k)
            mixed = attend(q.transpose(1, 2), store.keys(layer), store.values(layer), None).transpose(1, 2).flatten(2)
            of_streams = zip(streams, index.parts(mixed, len(streams)), own, strict=True)
            out = torch.cat([stream.attended(mix, x) for stream, mix, x in of_streams], dim=1)
            store.output(layer, 0, index.at, index.all, out)
        parts = _add(parts, store.all_outputs(layer, 0), modulations, 0)
        if isinstance(block, DoubleBlock):
            if index.at.shape[1]:
                words, image = index.parts(_at(_entered(parts, modulations, 1), index, store), 2)
                out = torch.cat((block.text.feed_forward(words), block.image.feed_forward(image)), dim=1)
                store.output(layer, 1, index.at, index.all, out)
            parts = _add(parts, store.all_outputs(layer, 1), modulations, 1)
        work.append(LayerWork(index.at.shape[1], values.at.shape[1], index.at.shape[1]))
    x = _finish(model, torch.cat(parts, dim=1), length)
    if (working := plan.working_rows()) is not None:  # with the time, hidden states of the others would change
        x = torch.where(working[:, None, None], x, store.hidden[:, :-1])
    store.write_hidden(everything.at, True, x)
    return tuple(work)


def _index(where: Tensor, text_length: int) -> _Index:
    """Of a flag bool `[B, T + N]`."""
    text, image = where.split((text_length, where.shape[1] - text_length), dim=1)
    widths = torch.stack([text.sum(1).max(), image.sum(1).max()]).tolist()
    words = query_index(text, widths[0])
    words = torch.where(words < text_length, words, where.shape[1])  # padding is behind the whole row
    return _Index(torch.cat((words, query_index(image, widths[1]) + text_length), dim=1), widths[0])


def _everything(store: FeatureStore, text: Tensor) -> _Index:
    return _Index(store.everywhere(), text.shape[1], True)


def _at(h: Tensor, index: _Index, store: FeatureStore) -> Tensor:
    return h if index.all else store.gather(h, index.at)


def _entered(parts: tuple[Tensor, ...], modulations: list[list[Modulation]], branch: int) -> Tensor:
    """Input of a branch at every token."""
    entered = [modulate(plain_norm(x), m[branch]) for x, m in zip(parts, modulations, strict=True)]
    return entered[0] if len(entered) == 1 else torch.cat(entered, dim=1)


def _add(
    parts: tuple[Tensor, ...], outputs: Tensor, modulations: list[list[Modulation]], branch: int
) -> tuple[Tensor, ...]:
    """The gated residual of a branch at every token."""
    of_parts = outputs.split([x.shape[1] for x in parts], dim=1)
    return tuple(x + m[branch].gate * out for x, out, m in zip(parts, of_parts, modulations, strict=True))


def _finish(model: MMDiT, joined: Tensor, split: int) -> Tensor:
    """`[B, n, D]` behind the blocks to `[B, n, c D]`, ready for the heads; the text's own D come first, then zeros."""
    text, image = joined[:, :split], model.leave_cells(joined[:, split:]).flatten(2)
    return torch.cat((F.pad(text, (0, image.shape[2] - text.shape[2])), image), dim=1)
