"""`FeatureStore`: features of every position of a request's rows, kept between passes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from unidiff.models.attention import block_causal_mask
from unidiff.models.rotary import RotaryTables, rotate
from unidiff.tokens.batch import TokenBatch

if TYPE_CHECKING:
    from unidiff.models.transformer import MaskedTransformer


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


class FeatureStore:
    """Features of B rows of one layout; every tensor has a spare position L that takes the padding of an index.

    Keys and values lie head by head, as attention reads them: batched products need no copy of what is kept. Rows are
    independent: a guidance stream is more rows. `narrow` gives views of some rows that share the memory.

    Attributes:
        key, value: `[layers, B, KV, L + 1, d]`. attention, feed_forward: `[layers, B, L + 1, D]` or empty.
        hidden: `[B, L + 1, D]`, final hidden states at their last computation.
        computed: int64 `[B, L + 1]`, the pass that computed a position, from 1; 0 for never.
        passes: int64 `[B]`. complete: bool `[B]`, rows without a position that was never computed; known without asking
            the device.
    """

    def __init__(self, model: MaskedTransformer, batch: TokenBatch, options: StoreOptions | None = None) -> None:
        """Zeros for the rows of `batch`, whose layout is fixed from here on; ids do not matter."""
        c, like = model.config, model.embed_tokens.weight
        options = StoreOptions() if options is None else options
        self.rotated, self.outputs = options.rotated, options.outputs
        rows, length = batch.shape
        self.head_dim = c.hidden_size // c.num_heads
        device, self.modality = batch.ids.device, batch.modality

        def zeros(layers: int, *shape: int) -> Tensor:
            return torch.zeros(layers, rows, *shape, dtype=like.dtype, device=device)

        kept = (c.num_kv_heads or c.num_heads, length + 1, self.head_dim)
        self.key, self.value = zeros(c.num_layers, *kept), zeros(c.num_layers, *kept)
        branches = c.num_layers if self.outputs else 0
        self.attention, self.feed_forward = (zeros(branches, length + 1, c.hidden_size) for _ in range(2))
        self.hidden = zeros(1, length + 1, c.hidden_size)[0]
        self.computed = torch.zeros(rows, length + 1, dtype=torch.long, device=device)
        self.passes = torch.zeros(rows, dtype=torch.long, device=device)
        self.complete = np.zeros(rows, dtype=np.bool_)
        self.rotary, self.spots = model.place(batch.positions, batch.modality)
        allowed = batch.attention_mask()
        if c.attention == "block_causal":
            allowed = block_causal_mask(batch.positions[..., 0], c.block_length, allowed)
        self.allowed = allowed  # [B, 1, L, L] or None
        self._everywhere = torch.arange(length, device=device).expand(rows, length)
        self._flat: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}  # of this pass: (id of an index, use) -> both

    @property
    def shape(self) -> tuple[int, int]:
        return self._everywhere.shape[0], self._everywhere.shape[1]

    def narrow(self, start: int, stop: int) -> FeatureStore:
        """The rows `[start, stop)`, in the same memory."""
        rows = slice(start, stop)
        view = self._layout_of(rows)
        for name in ("key", "value", "attention", "feed_forward"):
            setattr(view, name, getattr(self, name)[:, rows])
        for name in ("hidden", "computed", "passes", "complete"):
            setattr(view, name, getattr(self, name)[rows])
        return view

    def take(self, rows: Tensor) -> FeatureStore:
        """An empty store for some rows, int64 `[n]`; `put` brings its features back."""
        part = self._layout_of(rows)
        for name in ("key", "value", "attention", "feed_forward"):
            held = getattr(self, name)
            setattr(part, name, held.new_zeros(len(held), len(rows), *held.shape[2:]))
        part.hidden = self.hidden.new_zeros(len(rows), *self.hidden.shape[1:])
        part.computed, part.passes = self.computed[rows], self.passes[rows]
        part.complete = np.zeros(len(rows), dtype=np.bool_)
        return part

    def put(self, rows: Tensor, part: FeatureStore) -> None:
        """Replace all features of some rows by those of a store made by `take` (the number of passes stays)."""
        for name in ("key", "value", "attention", "feed_forward"):
            getattr(self, name).index_copy_(1, rows, getattr(part, name))
        for name in ("hidden", "computed"):
            getattr(self, name).index_copy_(0, rows, getattr(part, name))
        self.complete[rows.cpu().numpy()] = part.complete

    def _layout_of(self, rows: slice | Tensor) -> FeatureStore:
        part = object.__new__(FeatureStore)
        part.rotated, part.outputs, part.head_dim = self.rotated, self.outputs, self.head_dim
        part.modality, part._everywhere = self.modality[rows], self._everywhere[rows]
        part.rotary = RotaryTables(*(table[rows] for table in self.rotary))
        part.spots = None if self.spots is None else self.spots[rows]
        part.allowed = None if self.allowed is None else self.allowed[rows]
        part._flat = {}
        return part

    @property
    def age(self) -> Tensor:
        """int64 `[B, L]`: passes since each position was computed; as many as there were where it never was."""
        return self.passes[:, None] - self.computed[:, :-1]

    @property
    def nbytes(self) -> int:
        """Memory of the features."""
        held = (self.key, self.value, self.attention, self.feed_forward, self.hidden)
        return sum(x.numel() * x.element_size() for x in held)

    def everywhere(self) -> Tensor:
        """int64 `[B, L]`: the index of all positions; always the same object."""
        return self._everywhere

    def gather(self, x: Tensor, index: Tensor) -> Tensor:
        """`gather_rows` for `x` `[B, L, D]`; what an index means in memory is worked out once per pass."""
        if not index.numel() or not x.is_contiguous():
            return gather_rows(x, index)
        return x.view(-1, x.shape[-1]).index_select(0, self._place(index, "read")).view(*index.shape, -1)

    def rotary_at(self, index: Tensor) -> RotaryTables:
        """Tables of the positions of an index `[B, n]`."""
        return RotaryTables(*(self.gather(table.flatten(2), index)[:, :, None] for table in self.rotary))

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
                flat = kept[layer].view(-1, self.head_dim)
                flat.index_copy_(0, self._place(index, "heads"), fresh.reshape(-1, self.head_dim))

    def write_hidden(self, index: Tensor, whole: bool, hidden: Tensor) -> None:
        self._put(self.hidden, index, whole, hidden)

    def output(self, layer: int, branch: str, index: Tensor, whole: bool, fresh: Tensor) -> Tensor:
        """Keep a branch output `[B, n, D]` where the store has room for it; returns it."""
        if self.outputs:
            self._put(self._branch(branch)[layer], index, whole, fresh)
        return fresh

    def all_outputs(self, layer: int, branch: str) -> Tensor:
        """`[B, L, D]`: the kept outputs of `attention` or `feed_forward`."""
        return self._branch(branch)[layer, :, :-1]

    def keys(self, layer: int) -> Tensor:
        """`[B, KV, L, d]`, rotated."""
        k = self.key[layer, :, :, :-1]
        if self.rotated:
            return k
        tables = RotaryTables(*(table.transpose(1, 2) for table in self.rotary))  # [B, 1, L, d]
        return rotate(k, tables).to(k.dtype)

    def values(self, layer: int) -> Tensor:
        """`[B, KV, L, d]`."""
        return self.value[layer, :, :, :-1]

    def values_at(self, layer: int, index: Tensor) -> Tensor:
        """`[B, n, KV d]` at the positions of an index; anything on its padding."""
        rows, heads = self.value.shape[1:3]
        flat = self.value[layer].view(-1, self.head_dim).index_select(0, self._place(index, "heads"))
        return flat.view(rows, heads, -1, self.head_dim).transpose(1, 2).flatten(2)

    def _branch(self, branch: str) -> Tensor:
        return self.attention if branch == "attention" else self.feed_forward

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


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """`[B, L, D]` and int64 `[B, n]` to `[B, n, D]`; padding of the index (L or more) takes the last position."""
    rows, length, width = x.shape
    if not index.numel():
        return x.new_zeros(rows, index.shape[1], width)
    index = index.clamp_max(length - 1)
    apart = x.stride(0) // width if x.stride()[1:] == (width, 1) and x.stride(0) % width == 0 else 0
    if not apart or x.requires_grad:
        return x.gather(1, index[..., None].expand(-1, -1, width))
    # whole rows of memory, also where every row of the batch has a spare position behind it
    start = torch.arange(rows, device=x.device)[:, None] * apart
    flat = x.as_strided(((rows - 1) * apart + length, width), (width, 1))
    return flat.index_select(0, (index + start).flatten()).view(rows, -1, width)
