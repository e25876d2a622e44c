"""A transformer layer and its parts: norms, rotary positions, attention, feed-forward, and what the time does to them."""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unidiff.models.config import TransformerConfig
from unidiff.tokens import Modality

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

AttentionMask: TypeAlias = "Tensor | BlockMask | None"
"""bool `[B, 1, L, L]`, True where a query may see a key; the same for FlexAttention; or None, all see all."""

SCORES = 2**24  # up to so many of a batch (64 MiB in float32) the composed attention may hold for its backward pass


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


class RotaryTables(NamedTuple):
    """cos and (-sin, sin) of every position's angles, `[B, L, 1, head_dim]`, shared by all layers and heads."""

    cos: Tensor
    signed_sin: Tensor


def rotary_tables(
    positions: Tensor,
    modality: Tensor,
    head_dim: int,
    kind: str = "2d",
    theta: float = 1e4,
    linear_factor: float | Tensor = 1.0,
    dtype: torch.dtype = torch.float32,
) -> RotaryTables:
    """Tables for one batch.

    Args:
        positions: int64 `[B, L, 3]`: (index in the sample, image row, image column).
        modality: int64 `[B, L]`.
        head_dim: features per head; divisible by 4 for `kind="2d"`.
        kind: "1d": every token turns by its index. "2d": image tokens turn by row and column instead, in the
            interleaved layout [h0, w0, h1, w1, ...] of UniDisc, whose frequencies are theta^(-4i/head_dim).
        theta: base of the frequencies.
        linear_factor: rows and columns are divided by it (UniDisc: 1 at 256 px, 2 at 512 px); a number, or one per
            token `[B, L, 1]`.
        dtype: of the angles and tables; float32 or float64.
    """
    index = positions[..., 0, None].to(dtype)  # [B, L, 1]
    angles = index * _frequencies(head_dim // 2, theta, index)  # [B, L, d/2]
    if kind == "2d":
        grid = positions[..., 1:].to(dtype) / linear_factor  # [B, L, 2]
        frequencies = _frequencies(head_dim // 4, theta, index)
        by_place = (frequencies[:, None] * grid[..., None, :]).flatten(-2)  # [B, L, d/4, 2] -> [B, L, d/2]
        angles = torch.where((modality == Modality.IMAGE)[..., None], by_place, angles)
    cos, sin = angles[:, :, None].cos(), angles[:, :, None].sin()  # [B, L, 1, d/2]
    return RotaryTables(torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1))


def rotate(x: Tensor, tables: RotaryTables) -> Tensor:
    """Turn `x` `[B, L, H, d]` by the tables' angles; computed in the tables' dtype, returned in that of `x`."""
    cos, signed_sin = tables
    # rolling by d/2 swaps the halves, so this is (a cos - b sin, b cos + a sin)
    return (x * cos + x.roll(x.shape[-1] // 2, dims=-1) * signed_sin).to(x.dtype)


def _frequencies(count: int, theta: float, like: Tensor) -> Tensor:
    exponent = torch.arange(count, dtype=like.dtype, device=like.device) / count
    return theta**-exponent  # [count]


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


class Condition(NamedTuple):
    """What the layers are conditioned on, and which tokens it reaches.

    Attributes:
        vector: `[B, cond_dim]`.
        shifted: bool `[B, L, 1]`, tokens whose normed input is shifted and scaled; None for all.
        gated: bool `[B, L, 1]`, tokens whose branch output is gated; None for all.
    """

    vector: Tensor
    shifted: Tensor | None = None
    gated: Tensor | None = None

    def at(self, index: Tensor) -> Condition:
        """For the tokens at an index, int64 `[B, n]`."""
        return Condition(self.vector, *(x if x is None else gather_rows(x, index) for x in self[1:]))


class Modulation(NamedTuple):
    """adaLN of one residual branch, each broadcastable to `[B, L, D]`."""

    shift: Tensor
    scale: Tensor
    gate: Tensor


class TimeEmbedding(nn.Module):
    """Time `[B]` to the condition `[B, cond_dim]`: 256 sinusoidal features (cos first), Linear, SiLU, Linear, SiLU."""

    features = 256
    max_period = 10_000.0

    def __init__(self, cond_dim: int) -> None:
        super().__init__()
        self.up = nn.Linear(self.features, cond_dim)
        self.down = nn.Linear(cond_dim, cond_dim)

    def forward(self, time: Tensor) -> Tensor:
        half = self.features // 2
        exponent = torch.arange(half, dtype=torch.float32, device=time.device) / half
        angles = time.float()[:, None] * torch.exp(-math.log(self.max_period) * exponent)  # [B, 128]
        embedded = torch.cat((angles.cos(), angles.sin()), dim=-1).to(self.up.weight.dtype)
        return F.silu(self.down(F.silu(self.up(embedded))))


class AdaLN(nn.Module):
    """The condition to modulation vectors: `branches` times (shift, scale, gate), or one (shift, scale).

    Zero-initialised, so a gated branch starts as the identity.
    """

    def __init__(self, cond_dim: int, size: int, branches: int | None) -> None:
        super().__init__()
        self.branches = branches
        self.linear = nn.Linear(cond_dim, (2 if branches is None else 3 * branches) * size)

    def forward(self, condition: Condition | None) -> list[Modulation]:
        """One `Modulation` per branch; with `branches=None` one whose gate is 1."""
        assert condition is not None, "a time-conditioned model makes a condition in every pass"
        parts = self.linear(condition.vector)[:, None].chunk(2 if self.branches is None else 3 * self.branches, dim=-1)
        if self.branches is None:
            parts = (*parts, torch.ones_like(parts[0]))
        reach = ((condition.shifted, 0.0), (condition.shifted, 0.0), (condition.gated, 1.0))
        restricted = [
            part if where is None else torch.where(where, part, neutral)
            for part, (where, neutral) in zip(parts, reach * (len(parts) // 3), strict=True)
        ]
        return [Modulation(*restricted[i : i + 3]) for i in range(0, len(restricted), 3)]


def modulate(x: Tensor, modulation: Modulation | None) -> Tensor:
    """x (1 + scale) + shift; without a modulation x itself."""
    return x if modulation is None else x * (1 + modulation.scale) + modulation.shift


def gate(h: Tensor, modulation: Modulation | None) -> Tensor:
    """gate . h; without a modulation h itself."""
    return h if modulation is None else modulation.gate * h


class LayerView(Protocol):
    """One layer of a pass over some positions: keeps what is computed there, and knows what others left behind.

    The residual stream `x` `[B, n, D]` holds the positions of the pass; both methods return a branch's output for them.
    """

    def attention(self, block: Block, h: Tensor, rotary: RotaryTables, mask: AttentionMask) -> Tensor:
        """From the normed input `h` `[B, n, D]`."""
        ...

    def feed_forward(self, block: Block, x: Tensor, modulation: Modulation | None) -> Tensor:
        """From the residual stream."""
        ...


class Block(nn.Module):
    """x += gate . norm(attention(norm(x))); x += gate . norm(feed_forward(norm(x))); parts left out are identities.

    The feed-forward is a slot: any module with the same call works.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        c, size = config, config.hidden_size
        qk_eps = c.norm_eps if c.qk_norm_eps is None else c.qk_norm_eps
        biased = c.linear_bias if c.ffn_bias is None else c.ffn_bias
        self.attention_gate, self.dropout = c.attention_gate, c.dropout
        self.attention = Attention(
            size, c.num_heads, c.kv_heads, c.qk_norm, c.qk_norm_type, qk_eps, c.linear_bias, c.qkv_bias
        )
        self.feed_forward = FeedForward(size, c.inner_size, c.activation, biased)
        self.attention_norm, self.ffn_norm = (Norm(size, c.norm, c.norm_eps) for _ in range(2))
        self.attention_out_norm, self.ffn_out_norm = (
            Norm(size, c.norm, c.norm_eps) if c.sandwich_norm else None for _ in range(2)
        )
        self.ada_ln = AdaLN(c.cond_dim, size, branches=2) if c.time_conditioning else None

    def forward(
        self,
        x: Tensor,
        rotary: RotaryTables,
        mask: AttentionMask,
        condition: Condition | None = None,
        view: LayerView | None = None,
    ) -> Tensor:
        """`x` `[B, n, D]` to the same.

        Args:
            rotary, mask: of the positions in `x`; the mask as in `attend`.
            condition: where the model is conditioned on time.
            view: of a pass over some positions; None where `x` holds all that there are.
        """
        first, second = (None, None) if self.ada_ln is None else self.ada_ln(condition)
        h = modulate(self.attention_norm(x), first)
        if view is None:
            q, k, v = self.attention.project(h, rotary)
            h = self.attended(q, k.transpose(1, 2), v.transpose(1, 2), mask)
            del q, k, v  # the feed-forward takes their memory
        else:
            h = view.attention(self, h, rotary, mask)
        x = x + gate(h, first if self.attention_gate else None)
        h = self.fed(modulate(self.ffn_norm(x), second)) if view is None else view.feed_forward(self, x, second)
        return x + gate(h, second)

    def attended(self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
        """Output `[B, n, D]` of the attention branch from queries `[B, n, H, d]`, keys and values `[B, KV, L, d]`."""
        mixed = attend(q.transpose(1, 2), k, v, mask)  # [B, H, n, d]
        return self._leave(self.attention.out(mixed.transpose(1, 2).flatten(2)), self.attention_out_norm)

    def fed(self, h: Tensor) -> Tensor:
        """Output of the feed-forward branch from its input, both `[B, n, D]`."""
        return self._leave(self.feed_forward(h), self.ffn_out_norm)

    def _leave(self, h: Tensor, norm: Norm | None) -> Tensor:
        h = h if norm is None else norm(h)
        return F.dropout(h, self.dropout, self.training) if self.dropout else h


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
