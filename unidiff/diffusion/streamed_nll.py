"""Cross-entropy of a linear head without its logits: they are made tile by tile and made again in the backward pass.

    nll_i = logsumexp_v(h_i . w_v) - h_i . w_target      dh_i = sum_v (p_iv - y_iv) w_v      dw_v = sum_i (p_iv - y_iv) h_i

Two ways to the gradients, both without `[n, V]` for all n positions:

- `streamed_loss` knows what each position weighs. Its forward pass makes the logits of one chunk of positions, turns them into
  gradients where they lie, and drops them: three matrix products, the number of the plain formula.
- `streamed_nll` does not: logits are made again in the backward pass. The vocabulary is the outer loop, the positions the
  inner one, so that a tile of the weight gradient is finished while it is in cache.
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
    """Gathered positions that share one slice of the head, in chunks of one of few sizes: varying ones leak memory in bf16 on CPU.

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


def streamed_nll(hidden: Tensor, weight: Tensor, bias: Tensor | None, parts: Sequence[HeadPart]) -> Tensor:
    """-log softmax at the targets of every part, one after the other, flat `[sum of chunks * count]`.

    Args:
        hidden: `[N, D]`.
        weight, bias: of the whole head, `[V, D]` and `[V]` or None.
        parts: what to score; none gives an empty result whose gradients are zeros.

    Returns:
        float32 (float64 if `hidden` is); matmuls run in the autocast type where autocast is on, else in `hidden`'s.
        Gradients are once differentiable.
    """
    return _StreamedNLL.apply(hidden, weight, bias, parts, _product_type(hidden))


def streamed_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, parts: Sequence[HeadPart], scales: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """The sum of scale * NLL, a scalar with gradients, and the NLLs as `streamed_nll` gives them, without.

    Args:
        scales: of each part, `[chunks, count]`, the weights of its positions; 0 on padding.
    """
    return _StreamedLoss.apply(hidden, weight, bias, parts, _product_type(hidden), scales)


def _product_type(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    autocast = torch.is_autocast_enabled(device) and hidden.dtype != torch.float64
    return torch.get_autocast_dtype(device) if autocast else hidden.dtype


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
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, parts: Sequence[HeadPart], dtype: torch.dtype
    ) -> Tensor:
        exact, head, totals, values = _exact(hidden), _Head(weight, bias, dtype), [], []
        with torch.autocast(hidden.device.type, enabled=False):
            for part in parts:
                totals.append(torch.full(part.index.shape, -torch.inf, dtype=exact, device=hidden.device))
                values.append(_by_tiles(hidden, head, part, totals[-1]).reshape(-1))
        ctx.save_for_backward(hidden, weight, *(() if bias is None else (bias,)), *totals)
        ctx.parts, ctx.dtype, ctx.has_bias = parts, dtype, bias is not None
        return torch.cat(values) if values else hidden.new_zeros(0, dtype=exact)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, *rest = ctx.saved_tensors
        bias, totals = (rest[0], rest[1:]) if ctx.has_bias else (None, rest)
        return *_recomputed(ctx, hidden, _Head(weight, bias, ctx.dtype), totals, grad), None, None


class _StreamedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        parts: Sequence[HeadPart],
        dtype: torch.dtype,
        scales: Sequence[Tensor],
    ) -> tuple[Tensor, Tensor]:
        exact, head = _exact(hidden), _Head(weight, bias, dtype)
        sums = _Gradients(hidden, head, ctx.needs_input_grad, exact)
        loss, values = hidden.new_zeros((), dtype=exact), [hidden.new_zeros(0, dtype=exact)]
        with torch.autocast(hidden.device.type, enabled=False):
            for part, scale in zip(parts, (scale.to(exact) for scale in scales), strict=True):
                values.append(_by_chunks(hidden, head, part, scale, sums).reshape(-1))
                loss += (values[-1] * scale.reshape(-1)).sum()
        nll = torch.cat(values)
        ctx.sums, ctx.dtype = sums, hidden.dtype
        ctx.mark_non_differentiable(nll)
        return loss, nll

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        sums, ctx.sums = ctx.sums, None
        return *sums.scaled(grad, ctx.dtype), None, None, None


def _exact(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


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


def _by_chunks(hidden: Tensor, head: _Head, part: HeadPart, scale: Tensor, sums: _Gradients) -> Tensor:
    """NLL `[chunks, count]`, positions outside; `sums` gains the gradients at the weights `scale` `[chunks, count]`."""
    nll = torch.empty_like(scale)
    weight = head.weight[part.start : part.stop].to(head.dtype)
    bias = None if head.bias is None else head.bias[part.start : part.stop].to(head.dtype)
    few = max(1, TILE_ELEMENTS // len(weight))  # positions whose probabilities are in cache together
    for chunk, index in enumerate(part.index):
        states = hidden[index].to(head.dtype)  # [count, D]
        logits = F.linear(states, weight, bias)  # [count, n]; the only ones, and then the slopes
        for rows in torch.arange(len(index)).split(few):
            here = slice(int(rows[0]), int(rows[-1]) + 1)
            exact = _ban(logits[here].to(scale.dtype), part, part.start)
            target, real = part.target[chunk, here][:, None], part.real[chunk, here][:, None]
            top, own = exact.amax(1), exact.gather(1, target)[:, 0]
            chances = exact.softmax(1)
            nll[chunk, here] = top - chances.amax(1).log() - own
            logits[here] = chances.scatter_add_(1, target, -real.to(chances.dtype))
        sums.add_chunk(logits, states, weight, part, index, scale[chunk][:, None])
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

    def add_chunk(
        self, slope: Tensor, states: Tensor, weight: Tensor, part: HeadPart, index: Tensor, scale: Tensor
    ) -> None:
        """All of the slice `[count, n]` for one chunk at the rows `index`, each of which weighs `scale` `[count, 1]`."""
        here = slice(part.start, part.stop)
        self.hidden.index_add_(0, index, (slope @ weight).to(scale.dtype) * scale)
        if self.bias is not None:
            self.bias[here] += (scale.to(slope.dtype).T @ slope)[0].to(self.bias.dtype)
        if self.weight is not None:
            states = (states * scale).to(slope.dtype)
            if self.weight.dtype == slope.dtype:
                self.weight[here].addmm_(slope.T, states)
            else:
                self.weight[here] += slope.T @ states

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
    for column in part.forbidden:
        if low <= column + part.start < low + logits.shape[1]:
            logits[:, column + part.start - low] = -torch.inf
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
