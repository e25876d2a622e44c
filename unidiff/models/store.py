"""`FeatureStore`: features of every position of a request's rows, kept between passes; and `TokenIndex`, some of the positions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from unidiff.models.parts import RotaryTables, gather_rows, queries_of, query_index, rotate

Width = int | tuple[int, int]
"""Most positions in a row; a pair where a row has tokens of two streams."""


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
    """What a position takes in a store."""

    kv_heads: int  # of the keys and values of each layer
    head_dim: int
    width: int  # D, of hidden states and branch outputs
    branches: tuple[int, ...]  # for each layer, how many add to the residual stream
    hidden_width: int | None = None  # of the final hidden states, where it is not D
    border: int = 0  # positions before it are tokens of a first stream, those from it on of a second one
    interleaved: bool = False  # see `RotaryTables`


@dataclass(frozen=True, eq=False)
class TokenIndex:
    """Some positions of each row.

    A handful of indices serve all layers and tensors of a pass, so what they mean in memory is worked out once: `places`.
    """

    at: Tensor  # int64 [B, n], ascending in each stream; L on padding
    split: int = 0  # how many of them are of the first stream
    whole: bool = False  # all positions of every row
    places: dict[str, Tensor] = field(default_factory=dict, repr=False)

    @property
    def width(self) -> int:
        """n."""
        return self.at.shape[1]

    def narrowed(self, wanted: Tensor, length: int) -> tuple[Tensor, TokenIndex]:
        """Where the positions int64 `[B, m]` are among these, and they themselves; `length` for those that are not."""
        if self.whole:
            return wanted, TokenIndex(wanted)
        place = torch.searchsorted(self.at, wanted.contiguous()).clamp_max(self.width - 1)
        return place, TokenIndex(torch.where(self.at.gather(1, place) == wanted, wanted, length))


class KeysSeen(NamedTuple):
    """Keys that all queries of a row see in each layer, in place of what they may see, in some rows."""

    rows: Tensor  # bool [B]
    keys: Tensor  # bool [layers, B, L]


class FeatureStore:
    """Features of B rows of one layout; every tensor has a spare position L that takes the padding of an index.

    Keys and values lie head by head, as attention reads them: batched products need no copy of what is kept. Rows are
    independent: a guidance stream is more rows. `narrow` gives views of some rows that share the memory.

    Args:
        layout: see `StoreLayout`.
        shape: (B, L).
        like: has the dtype and the device.
        options: see `StoreOptions`.
        allowed: bool `[B, 1, L, L]` or `[B, 1, 1, L]`, which keys a query may see; None for all.
        inputs: what the model needs of the rows besides ids, `[B, L, ...]` each, worked out once; `cos` and `signed_sin`
            of the rotary tables among it.
    Attributes:
        key, value: `[layers, B, KV, L + 1, d]`. outputs: `[branches of all layers, B, L + 1, D]`, or empty.
        hidden: `[B, L + 1, D]`, final hidden states at their last computation.
        computed: int64 `[B, L + 1]`, the pass that computed a position, from 1; 0 for never.
        passes: int64 `[B]`. complete: bool `[B]`, rows without a position that was never computed; known without asking
            the device.
        keys_seen: of the coming pass, where a cache says which; None for none.
        tokens_of: from flags of positions in the rows `[B, L]` to those of the tokens that are kept, where these differ.
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
        self.tokens_of: Callable[[Tensor], Tensor] = lambda where: where
        self.keys_seen: KeysSeen | None = None
        self._first_output = list(accumulate((0, *layout.branches)))
        self.everywhere = TokenIndex(torch.arange(length, device=device).expand(rows, length), layout.border, True)

    @property
    def shape(self) -> tuple[int, int]:
        return self.everywhere.at.shape[0], self.everywhere.at.shape[1]

    @property
    def layers(self) -> int:
        return len(self.layout.branches)

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
        """Replace all features of some rows by those of a store made by `take` (passes and `complete` stay)."""
        for name in ("key", "value", "outputs"):
            getattr(self, name).index_copy_(1, rows, getattr(part, name))
        for name in ("hidden", "computed"):
            getattr(self, name).index_copy_(0, rows, getattr(part, name))

    def _layout_of(self, rows: slice | Tensor) -> FeatureStore:
        part = object.__new__(FeatureStore)
        part.options, part.layout, part._first_output = self.options, self.layout, self._first_output
        part.tokens_of, part.keys_seen = self.tokens_of, None
        part.everywhere = TokenIndex(self.everywhere.at[rows], self.layout.border, True)
        part.inputs = {name: table[rows] for name, table in self.inputs.items()}
        part.allowed = None if self.allowed is None else self.allowed[rows]
        return part

    @property
    def nbytes(self) -> int:
        """Memory of the features."""
        held = (self.key, self.value, self.outputs, self.hidden)
        return sum(x.numel() * x.element_size() for x in held)

    def index(self, where: Tensor, width: Width | None = None) -> TokenIndex:
        """Of the tokens bool `[B, L]`, at most `width` in a row; counted where it says nothing of two streams, or is None."""
        border = self.layout.border
        if not border:
            assert not isinstance(width, tuple)
            return TokenIndex(query_index(where, width))
        first, second = where[:, :border], where[:, border:]
        counts = width if isinstance(width, tuple) else torch.stack([n.max() for n in self.counts(where)]).tolist()
        own = query_index(first, counts[0])
        own = torch.where(own < border, own, where.shape[1])  # padding is behind the whole row
        return TokenIndex(torch.cat((own, query_index(second, counts[1]) + border), dim=1), own.shape[1])

    def counts(self, where: Tensor) -> list[Tensor]:
        """int64 `[B]`, how many tokens of a row are set in bool `[B, L]`; with two streams, of each."""
        border = self.layout.border
        return [part.sum(1) for part in ((where[:, :border], where[:, border:]) if border else (where,))]

    def gather(self, x: Tensor, index: TokenIndex) -> Tensor:
        """`[B, L, D]` to `[B, n, D]`; what an index means in memory is worked out once per pass."""
        if index.whole:
            return x
        if not index.at.numel() or not x.is_contiguous():
            return gather_rows(x, index.at)
        return x.view(-1, x.shape[-1]).index_select(0, self.place(index, "read")).view(*index.at.shape, -1)

    def inputs_at(self, index: TokenIndex, *names: str) -> dict[str, Tensor]:
        """Inputs, all or those of some names, at the positions of an index: `[B, n, ...]` each."""
        found = {}
        for name in names or self.inputs:
            x = self.inputs[name]
            found[name] = self.gather(x.reshape(*self.shape, -1), index).view(*index.at.shape, *x.shape[2:])
        return found

    def rotary(self, index: TokenIndex) -> RotaryTables | None:
        """The tables at the positions of an index; None for a model without any."""
        if "cos" not in self.inputs:
            return None
        found = self.inputs if index.whole else self.inputs_at(index, "cos", "signed_sin")
        return RotaryTables(found["cos"], found["signed_sin"], self.layout.interleaved)

    def visible(self, index: TokenIndex) -> Tensor | None:
        """bool `[B, 1, n, L]`: what the queries at the positions of an index may see; None where that is all.

        A position that was never computed is seen by nobody.
        """
        mask = self.allowed if index.whole else queries_of(self.allowed, index.at)
        if not self.complete.all():
            known = (self.computed[:, :-1] > 0)[:, None, None]  # [B, 1, 1, L]
            mask = known if mask is None else mask & known
        return mask

    def visible_in(self, layer: int, index: TokenIndex, mask: Tensor | None) -> Tensor | None:
        """`visible` as one layer has it, where a cache names the keys that are seen."""
        if self.keys_seen is None:
            return mask
        own = self.keys_seen.keys[layer, :, None, None]  # [B, 1, 1, L]
        if mask is None:
            mask = torch.ones_like(own)
        return torch.where(self.keys_seen.rows[:, None, None, None], own, mask)

    def begin(self, index: TokenIndex) -> None:
        """Count a pass that computes the positions of an index."""
        self.passes += 1
        if index.whole:
            self.computed[:, :-1] = self.passes[:, None]
            self.complete[:] = True
        else:
            self.computed.scatter_(1, index.at, self.passes[:, None].expand_as(index.at))

    def write_hidden(self, index: TokenIndex, hidden: Tensor) -> None:
        self.put_rows(self.hidden, index, hidden)

    def layer(self, number: int) -> LayerFeatures:
        """What is kept of one layer, in the same memory."""
        first, stop = self._first_output[number : number + 2]
        outputs = tuple(self.outputs[first:stop]) if self.options.outputs else ()
        return LayerFeatures(self, self.key[number], self.value[number], outputs)

    def keys(self, layer: int) -> Tensor:
        """`[B, KV, L, d]`, rotated or not as the options say."""
        return self.key[layer, :, :, :-1]

    def values(self, layer: int) -> Tensor:
        """`[B, KV, L, d]`."""
        return self.value[layer, :, :, :-1]

    def put_rows(self, kept: Tensor, index: TokenIndex, fresh: Tensor) -> None:
        """Write `[B, n, D]` into `[B, L + 1, D]`."""
        if index.whole:
            kept[:, :-1] = fresh
        else:
            width = kept.shape[-1]
            kept.view(-1, width).index_copy_(0, self.place(index, "write"), fresh.reshape(-1, width))

    def place(self, index: TokenIndex, use: str) -> Tensor:
        """The flat form of an index `[B, n]`: to `read` from B x L, to `write` to B x (L + 1), or over all `heads`."""
        known = index.places.get(use)
        if known is None:
            rows, length = self.shape
            at, places = index.at[:, None], length + 1  # [B, 1, n]
            count = 1
            if use == "read":
                at, places = at.clamp_max(length - 1), length
            elif use == "heads":
                count = self.key.shape[2]
            start = torch.arange(rows * count, device=at.device).view(rows, count, 1) * places
            known = index.places[use] = (at + start).flatten()
        return known


@dataclass(frozen=True, eq=False)
class LayerFeatures:
    """What a store keeps of one layer. A compiled layer knows its tensors by shape, so that all layers share one program.

    Attributes:
        key, value: `[B, KV, L + 1, d]`. outputs: `[B, L + 1, D]` of each branch, or none.
    """

    store: FeatureStore
    key: Tensor
    value: Tensor
    outputs: tuple[Tensor, ...]

    def write(self, index: TokenIndex, key: Tensor | None = None, value: Tensor | None = None) -> None:
        """Replace keys or values `[B, n, KV, d]`."""
        for kept, fresh in ((self.key, key), (self.value, value)):
            if fresh is None:
                continue
            fresh = fresh.transpose(1, 2)  # [B, KV, n, d]
            if index.whole:
                kept[:, :, :-1] = fresh
            else:
                size = kept.shape[-1]
                kept.view(-1, size).index_copy_(0, self.store.place(index, "heads"), fresh.reshape(-1, size))

    def write_output(self, branch: int, index: TokenIndex, fresh: Tensor) -> None:
        """Keep an output `[B, n, D]` of a branch."""
        self.store.put_rows(self.outputs[branch], index, fresh)

    def all_outputs(self, branch: int) -> Tensor:
        """`[B, L, D]`: the kept outputs of a branch."""
        return self.outputs[branch][:, :-1]

    def seen(self) -> tuple[Tensor, Tensor]:
        """Keys, rotated, and values of all positions, `[B, KV, L, d]`."""
        keys, store = self.key[:, :, :-1], self.store
        if not store.options.rotated and (tables := store.rotary(store.everywhere)) is not None:
            keys = rotate(keys.transpose(1, 2), tables).to(keys.dtype).transpose(1, 2)
        return keys, self.value[:, :, :-1]

    def values_at(self, index: TokenIndex) -> Tensor:
        """`[B, n, KV d]` at the positions of an index; anything on its padding."""
        rows, heads, _, size = self.value.shape
        flat = self.value.view(-1, size).index_select(0, self.store.place(index, "heads"))
        return flat.view(rows, heads, -1, size).transpose(1, 2).flatten(2)
