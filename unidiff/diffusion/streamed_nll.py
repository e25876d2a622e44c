"""Cross-entropy of a linear head without its logits: they are made tile by tile and made again in the backward pass.

    nll_i = logsumexp_v(h_i . w_v) - h_i . w_target      dh_i = sum_v (p_iv - y_iv) w_v      dw_v = sum_i (p_iv - y_iv) h_i

The vocabulary is the outer loop, the gathered positions the inner one, so that a tile of the weight gradient is finished
while it is in cache. At any time one `[count, tile]` block of logits exists; the log-sum-exp of every position is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

TILE_ELEMENTS = 1 << 22  # logits of one tile: 16 MiB in float32
TILE_MULTIPLE = 64


@runtime_checkable
class LinearHead(Protocol):
    """A model whose head is one matrix: logits = hidden @ weight.T + bias."""

    def head_parameters(self) -> tuple[Tensor, Tensor | None]:
        """Weight `[V, D]` and bias `[V]` or None."""
        ...


@dataclass(frozen=True)
class HeadPart:
    """Gathered positions that share one slice of the head.

    Attributes:
        index: int64 `[chunks, count]`, rows of the hidden states; padding points at row 0.
        target: int64 `[chunks, count]`, ids counted from `start`.
        real: bool `[chunks, count]`, False on padding, whose gradient is 0.
        start, stop: the slice.
        forbidden: offsets in the slice that are no candidates.
    """

    index: Tensor
    target: Tensor
    real: Tensor
    start: int
    stop: int
    forbidden: tuple[int, ...]


def streamed_nll(hidden: Tensor, weight: Tensor, bias: Tensor | None, parts: tuple[HeadPart, ...]) -> Tensor:
    """-log softmax at the targets of every part, one after the other, flat `[sum of chunks * count]`.

    Args:
        hidden: `[N, D]`.
        weight, bias: of the whole head, `[V, D]` and `[V]` or None.
        parts: what to score; none gives an empty result whose gradients are zeros.

    Returns:
        float32 (float64 if `hidden` is); matmuls run in the autocast type where autocast is on, else in `hidden`'s.
        Gradients are once differentiable.
    """
    device = hidden.device.type
    autocast = torch.is_autocast_enabled(device) and hidden.dtype != torch.float64
    dtype = torch.get_autocast_dtype(device) if autocast else hidden.dtype
    return _StreamedNLL.apply(hidden, weight, bias, parts, dtype)


class _StreamedNLL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, parts: tuple[HeadPart, ...], dtype: torch.dtype
    ) -> Tensor:
        exact = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        totals, picked = [], []
        with torch.autocast(hidden.device.type, enabled=False):
            for part in parts:
                total = torch.full(part.index.shape, -torch.inf, dtype=exact, device=hidden.device)  # log-sum-exp
                own = torch.zeros_like(total)  # logits of the targets
                rows = hidden[part.index].to(dtype)  # [chunks, count, D]
                for low, high, tile, offset in _tiles(weight, bias, part, dtype):
                    for chunk, states in enumerate(rows):
                        logits = _logits(states, tile, offset, part, low, exact)  # [count, tile]
                        target, inside = _local(part.target[chunk], low - part.start, high - low)
                        own[chunk] += logits.gather(1, target)[:, 0].where(inside, 0)
                        total[chunk] = torch.logaddexp(total[chunk], _logsumexp(logits))
                totals.append(total)
                picked.append(own)
        ctx.save_for_backward(hidden, weight, *(() if bias is None else (bias,)), *totals)
        ctx.parts, ctx.dtype, ctx.has_bias = parts, dtype, bias is not None
        values = [(total - own).reshape(-1) for total, own in zip(totals, picked, strict=True)]
        return torch.cat(values) if values else hidden.new_zeros(0, dtype=exact)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, *rest = ctx.saved_tensors
        bias, totals = (rest[0], rest[1:]) if ctx.has_bias else (None, rest)
        exact = grad.dtype
        grad_hidden = torch.zeros(hidden.shape, dtype=exact, device=hidden.device)
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros_like(bias) if bias is not None and ctx.needs_input_grad[2] else None
        taken = 0
        for part, total in zip(ctx.parts, totals, strict=True):
            scale = grad[taken : taken + total.numel()].view_as(total).where(part.real, 0)  # [chunks, count]
            taken += total.numel()
            rows = hidden[part.index].to(ctx.dtype)
            grad_rows = torch.zeros(rows.shape, dtype=exact, device=hidden.device)
            for low, high, tile, offset in _tiles(weight, bias, part, ctx.dtype):
                for chunk, states in enumerate(rows):
                    slope = _logits(states, tile, offset, part, low, exact)
                    slope.sub_(total[chunk, :, None]).exp_()  # probabilities [count, tile]
                    target, inside = _local(part.target[chunk], low - part.start, high - low)
                    slope.scatter_add_(1, target, -inside[:, None].to(exact))
                    slope.mul_(scale[chunk, :, None])
                    if grad_bias is not None:
                        grad_bias[low:high] += slope.sum(0).to(grad_bias.dtype)
                    slope = slope.to(ctx.dtype)
                    grad_rows[chunk] += slope @ tile
                    if grad_weight is not None:
                        grad_weight[low:high] += slope.T @ states
            grad_hidden.index_add_(0, part.index.reshape(-1), grad_rows.flatten(0, 1))
        return grad_hidden.to(hidden.dtype), grad_weight, grad_bias, None, None


def _tiles(
    weight: Tensor, bias: Tensor | None, part: HeadPart, dtype: torch.dtype
) -> Iterator[tuple[int, int, Tensor, Tensor | None]]:
    """(first id, last id + 1, weight `[n, D]`, bias `[n]`) of nearly equal runs of the slice, in the matmul type."""
    size = part.stop - part.start
    count = -(-size * part.index.shape[1] // TILE_ELEMENTS)
    step = -(-size // count // TILE_MULTIPLE) * TILE_MULTIPLE
    for low in range(part.start, part.stop, step):
        high = min(low + step, part.stop)
        yield low, high, weight[low:high].to(dtype), None if bias is None else bias[low:high].to(dtype)


def _logits(
    states: Tensor, tile: Tensor, offset: Tensor | None, part: HeadPart, low: int, exact: torch.dtype
) -> Tensor:
    logits = F.linear(states, tile, offset).to(exact)
    banned = [f + part.start - low for f in part.forbidden if low <= f + part.start < low + len(tile)]
    if banned:
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
