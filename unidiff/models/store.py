"""`FeatureStore`: features of every position of a request's rows, kept between passes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from unidiff.models.block import gather_rows


@dataclass(frozen=True)
class StoreOptions:
    """What a store keeps besides keys and values.

    Args:
        rotated: keys are kept after rotary, which saves rotating all of them at every use. Positions do not change
            within a request, so this is exact; False keeps them before rotary, as the reference systems do.
        outputs: keep the outputs of both branches (after projection and sandwich norm, before gate and residual add).
    """

    rotated: bool = True
    outputs: bool = False

    @classmethod
    def all_of(cls, options: Iterable[StoreOptions | None]) -> StoreOptions | None:
        """What a store for all of them keeps; None where nobody needs one."""
        stores = [s for s in options if s is not None]
        return cls(all(s.rotated for s in stores), any(s.outputs for s in stores)) if stores else None


@dataclass(frozen=True)
class StoreLayout:
    """What a position takes in a store.

    Attributes:
        kv_heads, head_dim: of the keys and values of each layer. width: D, of hidden states and branch outputs.
        branches: how many branches of each layer add to the residual stream; one number per layer.
        hidden_width: of the final hidden states, where it is not D.
    """

    kv_heads: int
    head_dim: int
    width: int
    branches: tuple[int, ...]
    hidden_width: int | None = None


class FeatureStore:
    """Features of B rows of one layout; every tensor has a spare position L that takes the padding of an index.

    Keys and values lie head by head, as attention reads them: batched products need no copy of what is kept. Rows are
    independent: a guidance stream is more rows. `narrow` gives views of some rows that share the memory.

    Args:
        layout: see `StoreLayout`.
        shape: (B, L).
        like: has the dtype and the device.
        options: see `StoreOptions`.
        allowed: bool `[B, 1, L, L]`, which keys a query may see; None for all.
        inputs: what the model needs of the rows besides ids, `[B, L, ...]` each, worked out once (rotary tables, ...).
    Attributes:
        key, value: `[layers, B, KV, L + 1, d]`. outputs: `[branches of all layers, B, L + 1, D]`, or empty.
        hidden: `[B, L + 1, D]`, final hidden states at their last computation.
        computed: int64 `[B, L + 1]`, the pass that computed a position, from 1; 0 for never.
        passes: int64 `[B]`. complete: bool `[B]`, rows without a position that was never computed; known without asking
            the device.
    """

    def __init__(
        self,
        layout: StoreLayout,
        shape: tuple[int, int],
        like: Tensor,
        options: StoreOptions | None = None,
        allowed: Tensor | None = None,
        inputs: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.options = StoreOptions() if options is None else options
        self.layout, self.allowed, self.inputs = layout, allowed, dict(inputs or {})
        (rows, length), device, layers = shape, like.device, len(layout.branches)

        def zeros(count: int, *of_row: int) -> Tensor:
            return torch.zeros(count, rows, *of_row, dtype=like.dtype, device=device)

        kept = (layout.kv_heads, length + 1, layout.head_dim)
        self.key, self.value = zeros(layers, *kept), zeros(layers, *kept)
        self.outputs = zeros(sum(layout.branches) if self.options.outputs else 0, length + 1, layout.width)
        self.hidden = zeros(1, length + 1, layout.hidden_width or layout.width)[0]
        self.computed = torch.zeros(rows, length + 1, dtype=torch.long, device=device)
        self.passes = torch.zeros(rows, dtype=torch.long, device=device)
        self.complete = np.zeros(rows, dtype=np.bool_)
        self._first_output = list(accumulate((0, *layout.branches)))
        self._everywhere = torch.arange(length, device=device).expand(rows, length)
        self._flat: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}  # of this pass: (id of an index, use) -> both

    @property
    def shape(self) -> tuple[int, int]:
        return self._everywhere.shape[0], self._everywhere.shape[1]

    def narrow(self, start: int, stop: int) -> FeatureStore:
        """The rows `[start, stop)`, in the same memory."""
        rows = slice(start, stop)
        view = self._layout_of(rows)
        for name in ("key", "value", "outputs"):
            setattr(view, name, getattr(self, name)[:, rows])
        for name in ("hidden", "computed", "passes", "complete"):
            setattr(view, name, getattr(self, name)[rows])
        return view

    def take(self, rows: Tensor) -> FeatureStore:
        """An empty store for some rows, int64 `[n]`; `put` brings its features back."""
        part = self._layout_of(rows)
        for name in ("key", "value", "outputs"):
            held = getattr(self, name)
            setattr(part, name, held.new_zeros(len(held), len(rows), *held.shape[2:]))
        part.hidden = self.hidden.new_zeros(len(rows), *self.hidden.shape[1:])
        part.computed, part.passes = self.computed[rows], self.passes[rows]
        part.complete = np.zeros(len(rows), dtype=np.bool_)
        return part

    def put(self, rows: Tensor, part: FeatureStore) -> None:
        """Replace all features of some rows by those of a store made by `take` (the number of passes stays)."""
        for name in ("key", "value", "outputs"):
            getattr(self, name).index_copy_(1, rows, getattr(part, name))
        for name in ("hidden", "computed"):
            getattr(self, name).index_copy_(0, rows, getattr(part, name))
        self.complete[rows.cpu().numpy()] = part.complete

    def _layout_of(self, rows: slice | Tensor) -> FeatureStore:
        part = object.__new__(FeatureStore)
        part.options, part.layout, part._first_output = self.options, self.layout, self._first_output
        part._everywhere = self._everywhere[rows]
        part.inputs = {name: table[rows] for name, table in self.inputs.items()}
        part.allowed = None if self.allowed is None else self.allowed[rows]
        part._flat = {}
        return part

    @property
    def nbytes(self) -> int:
        """Memory of the features."""
        held = (self.key, self.value, self.outputs, self.hidden)
        return sum(x.numel() * x.element_size() for x in held)

    def everywhere(self) -> Tensor:
        """int64 `[B, L]`: the index of all positions; always the same object."""
        return self._everywhere

    def gather(self, x: Tensor, index: Tensor) -> Tensor:
        """`gather_rows` for `x` `[B, L, D]`; what an index means in memory is worked out once per pass."""
        if not index.numel() or not x.is_contiguous():
            return gather_rows(x, index)
        return x.view(-1, x.shape[-1]).index_select(0, self._place(index, "read")).view(*index.shape, -1)

    def inputs_at(self, index: Tensor, *names: str) -> dict[str, Tensor]:
        """Inputs, all or those of some names, at the positions of an index: `[B, n, ...]` each."""
        found = {}
        for name in names or self.inputs:
            x = self.inputs[name]
            found[name] = self.gather(x.reshape(*self.shape, -1), index).view(*index.shape, *x.shape[2:])
        return found

    def visible(self, index: Tensor | None) -> Tensor | None:
        """bool `[B, 1, n, L]`: what the queries at `index` (None: all positions) may see; None where that is all.

        A position that was never computed is seen by nobody.
        """
        mask = self.allowed
        if mask is not None and index is not None:
            mask = gather_rows(mask[:, 0], index)[:, None]
        if not self.complete.all():
            known = (self.computed[:, :-1] > 0)[:, None, None]  # [B, 1, 1, L]
            mask = known if mask is None else mask & known
        return mask

    def begin(self, index: Tensor, whole: bool) -> None:
        """Count a pass that computes the positions of an index."""
        self.passes += 1
        self._flat.clear()
        if whole:
            self.computed[:, :-1] = self.passes[:, None]
            self.complete[:] = True
        else:
            self.computed.scatter_(1, index, self.passes[:, None].expand_as(index))

    def write(
        self, layer: int, index: Tensor, whole: bool, key: Tensor | None = None, value: Tensor | None = None
    ) -> None:
        """Replace keys or values `[B, n, KV, d]` of one layer."""
        for kept, fresh in ((self.key, key), (self.value, value)):
            if fresh is None:
                continue
            fresh = fresh.transpose(1, 2)  # [B, KV, n, d]
            if whole:
                kept[layer, :, :, :-1] = fresh
            else:
                flat = kept[layer].view(-1, self.layout.head_dim)
                flat.index_copy_(0, self._place(index, "heads"), fresh.reshape(-1, self.layout.head_dim))

    def write_hidden(self, index: Tensor, whole: bool, hidden: Tensor) -> None:
        self._put(self.hidden, index, whole, hidden)

    def output(self, layer: int, branch: int, index: Tensor, whole: bool, fresh: Tensor) -> Tensor:
        """Keep an output `[B, n, D]` of a layer's branch where the store has room for it; returns it."""
        if self.options.outputs:
            self._put(self.outputs[self._first_output[layer] + branch], index, whole, fresh)
        return fresh

    def all_outputs(self, layer: int, branch: int) -> Tensor:
        """`[B, L, D]`: the kept outputs of a layer's branch."""
        return self.outputs[self._first_output[layer] + branch, :, :-1]

    def keys(self, layer: int) -> Tensor:
        """`[B, KV, L, d]`, rotated or not as the options say."""
        return self.key[layer, :, :, :-1]

    def values(self, layer: int) -> Tensor:
        """`[B, KV, L, d]`."""
        return self.value[layer, :, :, :-1]

    def values_at(self, layer: int, index: Tensor) -> Tensor:
        """`[B, n, KV d]` at the positions of an index; anything on its padding."""
        rows, heads = self.value.shape[1:3]
        flat = self.value[layer].view(-1, self.layout.head_dim).index_select(0, self._place(index, "heads"))
        return flat.view(rows, heads, -1, self.layout.head_dim).transpose(1, 2).flatten(2)

    def _put(self, kept: Tensor, index: Tensor, whole: bool, fresh: Tensor) -> None:
        """Write `[B, n, D]` into `[B, L + 1, D]`."""
        if whole:
            kept[:, :-1] = fresh
        else:
            width = kept.shape[-1]
            kept.view(-1, width).index_copy_(0, self._place(index, "write"), fresh.reshape(-1, width))

    def _place(self, index: Tensor, use: str) -> Tensor:
        """The flat form of an index `[B, n]`: to `read` from B x L, to `write` to B x (L + 1), or over all `heads`.

        A handful of indices serve all layers and tensors of a pass, so what is worked out is kept until the next one.
        """
        known = self._flat.get((id(index), use))
        if known is None:
            rows, length = self.shape
            at, places = index[:, None], length + 1  # [B, 1, n]
            count = 1
            if use == "read":
                at, places = at.clamp_max(length - 1), length
            elif use == "heads":
                count = self.key.shape[2]
            start = torch.arange(rows * count, device=index.device).view(rows, count, 1) * places
            known = self._flat[id(index), use] = index, (at + start).flatten()  # the index stays alive with its id
        return known[1]
