"""Norms and feed-forward layers of the transformer."""

from __future__ import annotations

import torch
from torch import Tensor, nn
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
            return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)  # fused if dtypes agree
        # a weight gathered in bf16 beside a float32 residual stream: the kernel wants the wider type, never the narrower
        weight, bias = (
            None if p is None else p.to(torch.promote_types(p.dtype, x.dtype)) for p in (self.weight, self.bias)
        )
        return F.layer_norm(x, self.weight.shape, weight, bias, self.eps)


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
            return self.down(F.silu(gate) * up)
        return self.down(F.gelu(x, approximate="tanh" if self.activation == "gelu_tanh" else "none"))
