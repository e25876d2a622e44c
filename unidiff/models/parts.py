"""What layers are made of besides attention: norms, feed-forward, rotary positions; and rows of tensors by an index."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class Norm(nn.Module):
    """RMSNorm ("rms"), LayerNorm with a scale only ("layer"), or with scale and bias ("layer_bias")."""

    def __init__(self, size: int, kind: str = "rms", eps: float = 1e-6) -> None:
        super().__init__()
        self.kind, self.eps = kind, eps
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size)) if kind == "layer_bias" else None

    def forward(self, x: Tensor) -> Tensor:  # [..., size] -> [..., size]
        if self.kind == "rms":
            if x.device.type == "cpu":
                learns = torch.is_grad_enabled()
                return (_LearningRMSNorm.apply if learns else _rms_norm)(x, self.weight, self.eps)
            return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)  # fused if dtypes agree
        # a weight gathered in bf16 beside a float32 residual stream: the kernel wants the wider type, never the narrower
        wide = torch.promote_types(self.weight.dtype, x.dtype)
        bias = None if self.bias is None else self.bias.to(wide)
        return F.layer_norm(x, self.weight.shape, self.weight.to(wide), bias, self.eps)


def _root_scaled(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As `F.rms_norm`, which on a CPU is a chain of kernels that each hold all of x: here x is read twice, written once.

    Returns the norm, at least in float32, and what it multiplied x with, `[..., 1]`.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    normed = wide * scale if wide is x else wide.mul_(scale)
    return normed.mul_(weight), scale


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _root_scaled(x, weight, eps)[0].to(x.dtype)


class _LearningRMSNorm(torch.autograd.Function):
    """RMSNorm in the wider type of input and weight, with a backward pass of seven kernels in place of a score."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        normed, scale = _root_scaled(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return normed.to(torch.promote_types(x.dtype, weight.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        normed = x.to(scale.dtype) * scale
        product = (grad * normed).flatten(0, -2)  # [n, size]
        along = (product @ weight.to(scale.dtype)).div_(-x.shape[-1]).view(scale.shape)
        back = (grad * weight).addcmul_(normed, along).mul_(scale)
        return back.to(x.dtype), product.sum(0).to(weight.dtype), None


class FeedForward(nn.Module):
    """Dense feed-forward: down(act(up(x))), or down(silu(gate) * up) for "swiglu" with gate and up in one matrix."""

    def __init__(self, size: int, inner: int, activation: str, bias: bool) -> None:
        super().__init__()
        self.activation = activation
        self.up = nn.Linear(size, 2 * inner if activation == "swiglu" else inner, bias=bias)
        self.down = nn.Linear(inner, size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:  # [B, L, D] -> [B, L, D]
        x = self.up(x)
        if self.activation == "swiglu":
            gate, up = x.chunk(2, dim=-1)
            gate = F.silu(gate)
            return self.down(gate * up if torch.is_grad_enabled() else gate.mul_(up))
        return self.down(F.gelu(x, approximate="tanh" if self.activation == "gelu_tanh" else "none"))


class RotaryTables(NamedTuple):
    """cos and (-sin, sin) of every position's angles, `[B, L, 1, head_dim]`, shared by all layers and heads.

    RoFormer (Su et al. 2021), eq. 34: features i and i + d/2 of a head turn together by the angle position * theta^(-2i/d);
    interleaved: features 2i and 2i + 1 do. Tables that are narrower than a head turn its first features.
    """

    cos: Tensor
    signed_sin: Tensor
    interleaved: bool = False

    def at(self, index: Tensor) -> RotaryTables:
        """For the tokens at an index, int64 `[B, n]`."""
        return self._replace(
            cos=gather_rows(self.cos[:, :, 0], index)[:, :, None],
            signed_sin=gather_rows(self.signed_sin[:, :, 0], index)[:, :, None],
        )


def rotate(x: Tensor, tables: RotaryTables) -> Tensor:
    """Turn `x` `[B, L, H, d]` by the tables' angles; computed in the tables' dtype, returned in that of `x`."""
    cos, signed_sin, interleaved = tables
    if (turned := cos.shape[-1]) < x.shape[-1]:
        return torch.cat((rotate(x[..., :turned], tables), x[..., turned:]), dim=-1)
    if interleaved:  # pairs are complex numbers
        pairs = torch.view_as_complex(x.to(cos.dtype).unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * torch.complex(cos[..., ::2], signed_sin[..., 1::2])).flatten(-2).to(x.dtype)
    wide = x.to(torch.promote_types(x.dtype, cos.dtype))
    swapped = wide.roll(x.shape[-1] // 2, dims=-1)
    own = wide * cos if wide is x else wide.mul_(cos)
    return own.add_(swapped.mul_(signed_sin)).to(x.dtype)  # (a cos - b sin, b cos + a sin)


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


def queries_of(mask: Tensor | None, index: Tensor) -> Tensor | None:
    """What the queries at an index, int64 `[B, n]`, may see: bool `[B, 1, L, K]` to `[B, 1, n, K]`."""
    return mask if mask is None or mask.shape[2] == 1 else gather_rows(mask[:, 0], index)[:, None]


def query_index(query: Tensor, width: int | None = None) -> Tensor:
    """Positions of bool `[B, L]` as int64 `[B, n]`, ascending; L where a row has fewer than n."""
    if width is None:
        width = int(query.sum(1).max())
    length = query.shape[1]
    places = torch.where(query, torch.arange(length, device=query.device), length)  # [B, L]
    return places.sort(dim=1).values[:, :width].contiguous()
