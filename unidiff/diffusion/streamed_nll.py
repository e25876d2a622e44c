"""Cross-entropy of a linear head without its logits: they are made tile by tile and made again in the backward pass.

    nll_i = logsumexp_v(h_i . w_v) - h_i . w_target      dh_i = sum_v (p_iv - y_iv) w_v      dw_v = sum_i (p_iv - y_iv) h_i

Two ways to the gradients, both without `[n, V]` for all n positions:

- The caller says in advance what each position weighs in the loss. Then the forward pass makes the logits of one chunk of
  positions, takes the gradients from them, and drops them: three matrix products, the number of the plain formula. The
  backward pass scales what is there; should the weights turn out other than announced, it falls back to the second way.
- Otherwise logits are made again in the backward pass. The vocabulary is the outer loop, the positions the inner one, so
  that a tile of the weight gradient is finished while it is in cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

TILE_ELEMENTS = 1 << 20  # logits of one tile: 4 MiB in float32
TILE_MULTIPLE = 64


@runtime_checkable
class LinearHead(Protocol):
    """A model whose head is one matrix: logits = hidden @ weight.T + bias."""

    def head_parameters(self) -> tuple[Tensor, Tensor | None]:
        """Weight `[V, D]` and bias `[V]` or None."""
        ...


@dataclass(frozen=True)
class HeadPart:
    """Gathered positions that share one slice of the head, in chunks of one size: varying ones leak memory in bf16 on CPU.

    Attributes:
        index: int64 `[chunks, count]`, rows of the hidden states; padding points at row 0.
        slot: int64 `[chunks, count]`, the same with padding pointing behind the last row, a place to throw results away.
        target: int64 `[chunks, count]`, ids counted from `start`, 0 on padding.
        real: bool `[chunks, count]`, False on padding, whose gradient is 0.
        start, stop: the slice.
        forbidden: offsets in the slice that are no candidates.
    """

    index: Tensor
    slot: Tensor
    target: Tensor
    real: Tensor
    start: int
    stop: int
    forbidden: tuple[int, ...]


def streamed_nll(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, parts: Sequence[HeadPart], scale: Tensor | None = None
) -> Tensor:
    """-log softmax at the targets of every part, one after the other, flat `[sum of chunks * count]`.

    Args:
        hidden: `[N, D]`.
        weight, bias: of the whole head, `[V, D]` and `[V]` or None.
        parts: what to score; none gives an empty result whose gradients are zeros.
        scale: `[N]`, up to one common factor what each row's result will be multiplied with in the loss. It makes training
            faster and changes no result.

    Returns:
        float32 (float64 if `hidden` is); matmuls run in the autocast type where autocast is on, else in `hidden`'s.
        Gradients are once differentiable.
    """
    device = hidden.device.type
    autocast = torch.is_autocast_enabled(device) and hidden.dtype != torch.float64
    dtype = torch.get_autocast_dtype(device) if autocast else hidden.dtype
    announced = scale is not None and torch.is_grad_enabled() and len(parts) > 0
    return _StreamedNLL.apply(hidden, weight, bias, parts, dtype, scale if announced else None)


class _Head(NamedTuple):
    """The whole head and the type of its products."""

    weight: Tensor
    bias: Tensor | None
    dtype: torch.dtype

    def tiles(self, part: HeadPart) -> Iterator[tuple[int, int, Tensor, Tensor | None]]:
        """(first id, last id + 1, weight `[n, D]`, bias `[n]`) of nearly equal runs of the slice."""
        for low, high in _bounds(part):
            bias = None if self.bias is None else self.bias[low:high].to(self.dtype)
            yield low, high, self.weight[low:high].to(self.dtype), bias


class _StreamedNLL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        parts: Sequence[HeadPart],
        dtype: torch.dtype,
        scale: Tensor | None,
    ) -> Tensor:
        exact = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        head = _Head(weight, bias, dtype)
        ctx.sums = None if scale is None else _Gradients(hidden, head, ctx.needs_input_grad, exact)
        totals, values, scales = [], [], []
        with torch.autocast(hidden.device.type, enabled=False):
            for part in parts:
                total = torch.full(part.index.shape, -torch.inf, dtype=exact, device=hidden.device)  # log-sum-exp
                if scale is None:
                    nll = _by_tiles(hidden, head, part, total)
                else:
                    scales.append(scale.to(hidden.device)[part.index].to(exact).where(part.real, 0))  # [chunks, count]
                    nll = _by_chunks(hidden, head, part, total, scales[-1], ctx.sums)
                totals.append(total)
                values.append(nll.reshape(-1))
        ctx.save_for_backward(hidden, weight, *(() if bias is None else (bias,)), *totals)
        ctx.parts, ctx.dtype, ctx.has_bias = parts, dtype, bias is not None
        ctx.scale = torch.cat([s.reshape(-1) for s in scales]) if scales else None
        return torch.cat(values) if values else hidden.new_zeros(0, dtype=exact)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, *rest = ctx.saved_tensors
        bias, totals = (rest[0], rest[1:]) if ctx.has_bias else (None, rest)
        sums, ctx.sums = ctx.sums, None
        if sums is not None:
            grad = grad.where(torch.cat([part.real.reshape(-1) for part in ctx.parts]), 0)
            factor = (grad * ctx.scale).sum() / (ctx.scale * ctx.scale).sum()
            if torch.allclose(grad, factor * ctx.scale, rtol=1e-5, atol=0):  # not so where it is NaN
                return *sums.scaled(factor, hidden.dtype), None, None, None
        return *_recomputed(ctx, hidden, _Head(weight, bias, ctx.dtype), totals, grad), None, None, None


def _by_tiles(hidden: Tensor, head: _Head, part: HeadPart, total: Tensor) -> Tensor:
    """NLL `[chunks, count]`, vocabulary outside; fills the log-sum-exps `total`."""
    own = torch.zeros_like(total)  # logits of the targets
    rows = hidden[part.index].to(head.dtype)  # [chunks, count, D]
    for low, high, tile, offset in head.tiles(part):
        for chunk, states in enumerate(rows):
            logits = _ban(F.linear(states, tile, offset).to(total.dtype), part, low)  # [count, tile]
            target, inside = _local(part.target[chunk], low - part.start, high - low)
            own[chunk] += logits.gather(1, target)[:, 0].where(inside, 0)
            total[chunk] = torch.logaddexp(total[chunk], _logsumexp(logits))
    return total - own


def _by_chunks(hidden: Tensor, head: _Head, part: HeadPart, total: Tensor, scale: Tensor, sums: _Gradients) -> Tensor:
    """As `_by_tiles`, positions outside; `sums` gains the gradients at the weights `scale` `[chunks, count]`."""
    nll = torch.empty_like(total)
    for chunk, index in enumerate(part.index):
        states = hidden[index].to(head.dtype)  # [count, D]
        logits = states.new_empty(len(index), part.stop - part.start)  # [count, n]; the only ones
        for low, high, tile, offset in head.tiles(part):
            logits[:, low - part.start : high - part.start] = F.linear(states, tile, offset)
        for low, high in _bounds(part):  # without an exact copy of all logits
            piece = logits[:, low - part.start : high - part.start].to(total.dtype, copy=True)
            total[chunk] = torch.logaddexp(total[chunk], _logsumexp(_ban(piece, part, low)))
        nll[chunk] = total[chunk] - logits.gather(1, part.target[chunk][:, None])[:, 0].to(total.dtype)
        grad_rows = torch.zeros(states.shape, dtype=total.dtype, device=hidden.device)
        for low, high, tile, _ in head.tiles(part):
            piece = _ban(logits[:, low - part.start : high - part.start].to(total.dtype, copy=True), part, low)
            sums.add(piece, states, tile, part, chunk, low, total[chunk], scale[chunk], grad_rows)
        sums.hidden.index_add_(0, index, grad_rows)
        del logits
    return nll


def _recomputed(
    ctx: Any, hidden: Tensor, head: _Head, totals: Sequence[Tensor], grad: Tensor
) -> tuple[Tensor | None, ...]:
    """Gradients for any upstream gradient, flat as the result, from logits made again."""
    sums = _Gradients(hidden, head, ctx.needs_input_grad, grad.dtype)
    scales = grad.split([total.numel() for total in totals])
    for part, total, flat in zip(ctx.parts, totals, scales, strict=True):
        scale = flat.view_as(total).where(part.real, 0)  # [chunks, count]
        rows = hidden[part.index].to(head.dtype)
        grad_rows = torch.zeros(rows.shape, dtype=grad.dtype, device=hidden.device)
        for low, _, tile, offset in head.tiles(part):
            for chunk, states in enumerate(rows):
                logits = _ban(F.linear(states, tile, offset).to(grad.dtype), part, low)
                sums.add(logits, states, tile, part, chunk, low, total[chunk], scale[chunk], grad_rows[chunk])
        sums.hidden.index_add_(0, part.index.reshape(-1), grad_rows.flatten(0, 1))
    return sums.scaled(None, hidden.dtype)


class _Gradients:
    """Sums of dh `[N, D]`, dw `[V, D]` and db `[V]`, each only where it is needed."""

    def __init__(self, hidden: Tensor, head: _Head, needed: tuple[bool, ...], exact: torch.dtype) -> None:
        self.hidden = torch.zeros(hidden.shape, dtype=exact, device=hidden.device)
        self.weight = torch.zeros_like(head.weight) if needed[1] else None
        self.bias = torch.zeros_like(head.bias) if head.bias is not None and needed[2] else None

    def add(
        self,
        logits: Tensor,
        states: Tensor,
        tile: Tensor,
        part: HeadPart,
        chunk: int,
        low: int,
        total: Tensor,
        scale: Tensor,
        grad_rows: Tensor,
    ) -> None:
        """One tile of logits `[count, n]` of one chunk, which it overwrites; dh of the chunk goes to `grad_rows`."""
        slope = logits.sub_(total[:, None]).exp_()  # probabilities
        target, inside = _local(part.target[chunk], low - part.start, len(tile))
        slope.scatter_add_(1, target, -inside[:, None].to(slope.dtype))
        slope.mul_(scale[:, None])
        if self.bias is not None:
            self.bias[low : low + len(tile)] += slope.sum(0).to(self.bias.dtype)
        slope = slope.to(tile.dtype)
        grad_rows += slope @ tile
        if self.weight is not None:
            self.weight[low : low + len(tile)] += slope.T @ states

    def scaled(self, factor: Tensor | None, dtype: torch.dtype) -> tuple[Tensor | None, ...]:
        """Everything times a number, or as it is; `hidden` in `dtype`."""
        for value in (self.hidden, self.weight, self.bias):
            if value is not None and factor is not None:
                value.mul_(factor)
        return self.hidden.to(dtype), self.weight, self.bias


def _bounds(part: HeadPart) -> Iterator[tuple[int, int]]:
    size = part.stop - part.start
    count = -(-size * part.index.shape[1] // TILE_ELEMENTS)
    step = -(-size // count // TILE_MULTIPLE) * TILE_MULTIPLE
    for low in range(part.start, part.stop, step):
        yield low, min(low + step, part.stop)


def _ban(logits: Tensor, part: HeadPart, low: int) -> Tensor:
    """-inf for the forbidden ids of a tile that begins at `low`, in place."""
    if banned := [f + part.start - low for f in part.forbidden if low <= f + part.start < low + logits.shape[1]]:
        logits[:, banned] = -torch.inf
    return logits


def _local(target: Tensor, first: int, size: int) -> tuple[Tensor, Tensor]:
    """Column of each target in the tile that begins at `first`, `[count, 1]`, and whether it lies there, `[count]`."""
    column = target - first
    return column.clamp(0, size - 1)[:, None], (column >= 0) & (column < size)


def _logsumexp(logits: Tensor) -> Tensor:
    """Over the last axis; overwrites its argument, which saves a tile."""
    top = logits.amax(1, keepdim=True)
    safe = top.clamp_min(torch.finfo(top.dtype).min)  # a tile of forbidden ids only: -inf, not NaN
    return logits.sub_(safe).exp_().sum(1).log() + safe[:, 0]
