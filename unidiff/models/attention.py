"""Self-attention over a whole row: fused qkv, optional QK norm, rotary, grouped keys, SDPA."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unidiff.models.layers import Norm
from unidiff.models.rotary import RotaryTables, rotate

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

AttentionMask: TypeAlias = "Tensor | BlockMask | None"
"""bool `[B, 1, L, L]`, True where a query may see a key; the same for FlexAttention; or None, all see all."""

SCORES = 2**24  # up to so many of a batch (64 MiB in float32) the composed attention may hold for its backward pass


class Attention(nn.Module):
    """The projections of multi-head attention with `num_kv_heads` shared key/value heads; `Block` puts them together.

    The rows of `qkv` are all queries, then all keys, then all values, each head by head.
    """

    def __init__(
        self,
        size: int,
        num_heads: int,
        num_kv_heads: int,
        qk_norm: str = "none",
        qk_norm_type: str = "rms",
        qk_norm_eps: float = 1e-6,
        bias: bool = False,
        qkv_bias: bool | None = None,
    ) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.head_dim = size // num_heads
        self.qk_norm = qk_norm
        kv_size = num_kv_heads * self.head_dim
        self.qkv = nn.Linear(size, size + 2 * kv_size, bias=bias if qkv_bias is None else qkv_bias)
        self.out = nn.Linear(size, size, bias=bias)
        if qk_norm != "none":
            widths = (size, kv_size) if qk_norm == "width" else (self.head_dim, self.head_dim)
            self.q_norm, self.k_norm = (Norm(width, qk_norm_type, qk_norm_eps) for width in widths)

    def project(self, x: Tensor, rotary: RotaryTables) -> tuple[Tensor, Tensor, Tensor]:
        """Queries `[B, L, H, d]`, keys and values `[B, L, KV, d]`; queries and keys normed and rotated."""
        if self.qk_norm == "none" and not torch.is_grad_enabled():  # half the kernels; gradients would need joining
            heads, kv = self.num_heads, self.num_kv_heads
            both, v = self.qkv(x).unflatten(-1, (-1, self.head_dim)).split((heads + kv, kv), dim=-2)
            q, k = rotate(both, rotary).split((heads, kv), dim=-2)
            return q, k, v
        heads, kv, d = self.num_heads, self.num_kv_heads, self.head_dim
        q, k, v = self.qkv(x).split((heads * d, kv * d, kv * d), dim=-1)
        q, k = self._normed(q, k)
        return rotate(q, rotary).to(v.dtype), rotate(k, rotary).to(v.dtype), v.unflatten(-1, (kv, d))

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As `project`, before rotary."""
        heads, kv, d = self.num_heads, self.num_kv_heads, self.head_dim
        q, k, v = self.qkv(x).split((heads * d, kv * d, kv * d), dim=-1)
        return *self._normed(q, k), v.unflatten(-1, (kv, d))

    def query_key(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys of `heads` alone."""
        heads, kv, d = self.num_heads, self.num_kv_heads, self.head_dim
        return self._normed(*self._rows(x, 0, (heads + kv) * d).split((heads * d, kv * d), dim=-1))

    def value(self, x: Tensor) -> Tensor:
        """Values of `heads` alone."""
        start = (self.num_heads + self.num_kv_heads) * self.head_dim
        return self._rows(x, start, None).unflatten(-1, (self.num_kv_heads, self.head_dim))

    def _rows(self, x: Tensor, start: int, stop: int | None) -> Tensor:
        bias = None if self.qkv.bias is None else self.qkv.bias[start:stop]
        return F.linear(x, self.qkv.weight[start:stop], bias)

    def _normed(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        if self.qk_norm == "width":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = q.unflatten(-1, (self.num_heads, self.head_dim)), k.unflatten(-1, (self.num_kv_heads, self.head_dim))
        return (self.q_norm(q), self.k_norm(k)) if self.qk_norm == "head" else (q, k)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
    """softmax(q k^T / sqrt(d)) v: `[B, H, L, d]` and `[B, KV, L, d]` to `[B, H, L, d]`. Fully masked queries give 0."""
    grouped = q.shape[1] != k.shape[1]
    if mask is not None and not isinstance(mask, Tensor):
        return _flex_attention(q.device.type)(q, k, v, block_mask=mask, enable_gqa=grouped)
    held = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
    if mask is None and not grouped and q.requires_grad and q.device.type == "cpu" and held <= SCORES:
        # On CPU the fused kernel takes 1.4 times (256 and 512 tokens) to 1.6 times (384) as long, forward and backward.
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # [B, H, L, L]
        return scores.softmax(-1).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)


@cache
def _flex_attention(device: str) -> Any:
    """FlexAttention, compiled where that gives the fused kernel; on a CPU as it is, without a backward pass."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention) if device == "cuda" else flex_attention


def block_causal_mask(index: Tensor, block_length: int, allowed: Tensor | None) -> Tensor:
    """bool `[B, 1, L, L]`: a query sees its own block of `block_length` positions and earlier ones (BD3-LM).

    Args:
        index: int64 `[B, L]`, position inside the sample.
        block_length: tokens per block.
        allowed: bool `[B, 1, L, L]` that keeps samples and padding apart, or None for one sample per row.
    """
    block = torch.div(index, block_length, rounding_mode="floor")  # [B, L]
    visible = (block[:, :, None] >= block[:, None, :])[:, None]  # [B, 1, L, L]
    return visible if allowed is None else visible & allowed
