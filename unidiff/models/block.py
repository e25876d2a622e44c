"""A transformer layer: attention, what the time does to its branches, and views of the tokens that they compute and see."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unidiff.models.config import TransformerConfig
from unidiff.models.experts import MixtureOfExperts
from unidiff.models.parts import FeedForward, Norm, RotaryTables, gather_rows, rotate

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

AttentionMask: TypeAlias = "Tensor | BlockMask | None"
"""bool `[B, 1, L, L]`, or `[B, 1, 1, L]` where all queries of a row see the same: True where a query may see a key; the same
for FlexAttention; or None, all see all."""

SINUSOID = 256  # features of a time
SCORES = 2**24  # up to so many of a batch (64 MiB in float32) the composed attention may hold for its backward pass


class HeadProjection(nn.Module):
    """Queries, keys and values of multi-head attention with `num_kv_heads` shared key/value heads.

    The rows of `qkv` are all queries, then all keys, then all values, each head by head.

    Args:
        qk_norm: "none", "head" or "width", a norm of queries and keys of the kind `qk_norm_type`.
        head_dim: features of a head; None for size / num_heads.
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
        head_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim or size // num_heads
        self.qk_norm = qk_norm
        q_size, kv_size = num_heads * self.head_dim, num_kv_heads * self.head_dim
        self.qkv = nn.Linear(size, q_size + 2 * kv_size, bias=bias)
        if qk_norm != "none":
            widths = (q_size, kv_size) if qk_norm == "width" else (self.head_dim, self.head_dim)
            self.q_norm, self.k_norm = (Norm(width, qk_norm_type, qk_norm_eps) for width in widths)

    def forward(
        self,
        x: Tensor,
        rotary: RotaryTables | None = None,
        values: bool = True,
        asked: Tensor | None = None,
        turns: RotaryTables | None = None,
    ) -> tuple[Tensor, ...]:
        """Normed queries `[B, L, H, d]`, normed keys `[B, L, KV, d]`, both rotated by tables if any, and values (if asked).

        Args:
            asked: `[B, m, D]`, those of `x` that have queries, with tables of their own (`turns`); None or `x` itself for all.
        """
        heads, kv, d = self.num_heads, self.num_kv_heads, self.head_dim
        stop = None if values else (heads + kv) * d
        if asked is not None and asked is not x:
            q = self._rows(asked, 0, heads * d)
            k, *v = self._rows(x, heads * d, stop).split((kv * d,) * (1 + values), dim=-1)
        else:
            projected, turns = self._rows(x, 0, stop), rotary
            if rotary is not None and self.qk_norm == "none" and not torch.is_grad_enabled():
                # half the kernels; gradients would need joining
                both, *v = projected.unflatten(-1, (-1, d)).split((heads + kv, kv)[: 1 + values], dim=-2)
                return *rotate(both, rotary).split((heads, kv), dim=-2), *v
            q, k, *v = projected.split((heads * d, kv * d, kv * d)[: 2 + values], dim=-1)
        dtype = k.dtype
        if self.qk_norm == "width":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, *v = (part.unflatten(-1, (-1, d)) for part in (q, k, *v))
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None and turns is not None:
            q, k = rotate(q, turns).to(dtype), rotate(k, rotary).to(dtype)
        return q, k, *v

    def value(self, x: Tensor) -> Tensor:
        """Values alone."""
        start = (self.num_heads + self.num_kv_heads) * self.head_dim
        return self._rows(x, start, None).unflatten(-1, (self.num_kv_heads, self.head_dim))

    def _rows(self, x: Tensor, start: int, stop: int | None) -> Tensor:
        linear = self.qkv
        heard = linear._forward_pre_hooks or linear._forward_hooks
        if type(linear) is not nn.Linear or "forward" in vars(linear) or heard:
            return linear(x)[..., start:stop]  # adapters, offloading, shards and hooks are parts of it
        bias = None if self.qkv.bias is None else self.qkv.bias[start:stop]
        return F.linear(x, self.qkv.weight[start:stop], bias)


class Attention(HeadProjection):
    """The same, and the output projection."""

    def __init__(self, size: int, *options: Any, out_bias: bool) -> None:
        super().__init__(size, *options)
        self.out = nn.Linear(self.num_heads * self.head_dim, size, bias=out_bias)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
    """softmax(q k^T / sqrt(d)) v: `[B, H, L, d]` and `[B, KV, L, d]` to `[B, H, L, d]`. Fully masked queries give 0."""
    grouped = q.shape[1] != k.shape[1]
    if mask is not None and not isinstance(mask, Tensor):
        return _flex_attention(q.device.type)(q, k, v, block_mask=mask, enable_gqa=grouped)
    held = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
    if mask is None and not grouped and q.requires_grad and q.device.type == "cpu" and held <= SCORES:
        # On CPU the fused kernel takes 1.4 times (256 and 512 tokens) to 1.6 times (384) as long, forward and backward.
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # [B, H, L, L]
        # not `softmax`, which autocast would give and take wider numbers; inside it counts in float32 all the same
        return torch._softmax(scores, -1, False).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)


@cache
def _flex_attention(device: str) -> Any:
    """FlexAttention, compiled where that gives the fused kernel; on a CPU as it is, without a backward pass."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention) if device == "cuda" else flex_attention


class Condition(NamedTuple):
    """What the layers are conditioned on, and which tokens it reaches."""

    vector: Tensor  # [B, cond_dim]
    shifted: Tensor | None = None  # bool [B, L, 1], tokens whose normed input is shifted and scaled; None for all
    gated: Tensor | None = None  # bool [B, L, 1], tokens whose branch output is gated; None for all

    def at(self, index: Tensor) -> Condition:
        """For the tokens at an index, int64 `[B, n]`."""
        return Condition(self.vector, *(x if x is None else gather_rows(x, index) for x in self[1:]))


class Modulation(NamedTuple):
    """adaLN of one residual branch, each broadcastable to `[B, L, D]`."""

    shift: Tensor
    scale: Tensor
    gate: Tensor

    def at(self, index: Tensor) -> Modulation:
        """For the tokens at an index, int64 `[B, n]`."""
        return Modulation(*(x if x.shape[1] == 1 else gather_rows(x, index) for x in self))


def sinusoid(values: Tensor) -> Tensor:
    """`[...]` to `[..., 256]` = [cos, sin] of value * 10000^(-j / 128), in float32."""
    exponent = torch.arange(SINUSOID // 2, dtype=torch.float32, device=values.device) / (SINUSOID // 2)
    angles = values.float()[..., None] * (exponent * -math.log(1e4)).exp()
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


class TimeEmbedding(nn.Module):
    """Time `[B]` to the condition `[B, cond_dim]`: sinusoidal features, Linear, SiLU, Linear, SiLU."""

    def __init__(self, cond_dim: int) -> None:
        super().__init__()
        self.up = nn.Linear(SINUSOID, cond_dim)
        self.down = nn.Linear(cond_dim, cond_dim)

    def forward(self, time: Tensor) -> Tensor:
        return F.silu(self.down(F.silu(self.up(sinusoid(time).to(self.up.weight.dtype)))))


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
    return x if modulation is None else (x * (1 + modulation.scale)).add_(modulation.shift)


def add_branch(x: Tensor, h: Tensor, modulation: Modulation | None) -> Tensor:
    """x + gate . h; without a modulation x + h."""
    if modulation is None:
        return x + h
    gated = modulation.gate * h
    return gated.add_(x) if gated.dtype == x.dtype else x + gated


class Stream(Protocol):
    """Tokens with weights of their own: what the two branches of a layer do with them, before gate and residual add."""

    @property
    def heads(self) -> HeadProjection: ...

    def attended(self, mixed: Tensor, entered: Tensor) -> Tensor:
        """Output of the first branch from what attention mixed, and from the branch's input; all `[B, n, D]`."""
        ...

    def fed(self, entered: Tensor) -> Tensor:
        """Output of the second branch from its input, both `[B, n, D]`."""
        ...


Streams: TypeAlias = Sequence[Stream]
Parts: TypeAlias = Sequence[Tensor]


class View(Protocol):
    """Which tokens the branches of a layer compute and see; inputs and outputs `[B, n, D]` of each stream.

    Attributes:
        left: int64 `[B, m]`, which of the n tokens go on from attention, where the others are seen for the last time: it
            returns `[B, m, D]`, and so on. None for all.
    """

    left: Tensor | None

    def attention(self, streams: Streams, entered: Parts) -> Parts: ...

    def feed_forward(self, streams: Streams, entered: Parts) -> Parts: ...


@dataclass
class WholeView:
    """`View` of a pass over all tokens; the tables (None: no positions) fit its keys, the mask its queries as in `attend`.
    `left`: of one stream."""

    rotary: RotaryTables | None
    mask: AttentionMask = None
    turns_keys: bool = True
    left: Tensor | None = None

    def attention(self, streams: Streams, entered: Parts) -> Parts:
        rotary, turns, asked = self.rotary, self.rotary, entered
        if self.left is not None:
            turns = None if rotary is None else rotary.at(self.left)
            asked = [gather_rows(h, self.left) for h in entered]
        if len(streams) == 1 and self.turns_keys:
            q, k, v = streams[0].heads(entered[0], rotary, asked=asked[0], turns=turns)
        else:
            own = (stream.heads(h, asked=part) for stream, h, part in zip(streams, entered, asked, strict=True))
            q, k, v = (joined(part) for part in zip(*own, strict=True))
            q = q if turns is None else rotate(q, turns).to(v.dtype)
            k = rotate(k, rotary).to(v.dtype) if self.turns_keys and rotary is not None else k
        return attended(streams, q, *self.seen(k, v), self.mask, asked)

    def seen(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """From keys and values `[B, n, KV, d]` of this pass to those attended to, `[B, KV, L, d]`, all keys rotated."""
        return key.transpose(1, 2), value.transpose(1, 2)

    def feed_forward(self, streams: Streams, entered: Parts) -> Parts:
        return [stream.fed(h) for stream, h in zip(streams, entered, strict=True)]


def attended(streams: Streams, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, entered: Parts) -> Parts:
    """First branch of each stream from queries `[B, n, H, d]`, and keys and values `[B, KV, L, d]`."""
    mixed = attend(q.transpose(1, 2), k, v, mask).transpose(1, 2).flatten(2)  # [B, n, D]
    own = mixed.split([h.shape[1] for h in entered], dim=1) if len(streams) > 1 else (mixed,)
    return [stream.attended(part, h) for stream, part, h in zip(streams, own, entered, strict=True)]


def joined(parts: Parts) -> Tensor:
    """Streams `[B, n, ...]` one behind the other."""
    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts), dim=1)


class Block(nn.Module):
    """x += gate . norm(attention(norm(x))); x += gate . norm(feed_forward(norm(x))); parts left out are identities.

    A `Stream` of its own. The feed-forward is a slot: any module with the same call works, a mixture of experts in some layers.
    """

    def __init__(self, config: TransformerConfig, layer: int = 0) -> None:
        super().__init__()
        c, size = config, config.hidden_size
        qk_eps = c.norm_eps if c.qk_norm_eps is None else c.qk_norm_eps
        qkv_biased = c.linear_bias if c.qkv_bias is None else c.qkv_bias
        heads = (c.num_heads, c.kv_heads, c.qk_norm, c.qk_norm_type, qk_eps, qkv_biased, c.head_dim)
        self.attention_gate, self.dropout = c.attention_gate, c.dropout
        self.attention = Attention(size, *heads, out_bias=c.linear_bias)
        biased = c.linear_bias if c.ffn_bias is None else c.ffn_bias
        self.feed_forward = (
            MixtureOfExperts(c) if c.has_experts(layer) else FeedForward(size, c.inner_size, c.activation, biased)
        )
        self.attention_norm, self.ffn_norm = (Norm(size, c.norm, c.norm_eps) for _ in range(2))
        self.attention_out_norm, self.ffn_out_norm = (
            Norm(size, c.norm, c.norm_eps) if c.sandwich_norm else None for _ in range(2)
        )
        self.ada_ln = AdaLN(c.cond_dim, size, branches=2) if c.time_conditioning else None

    @property
    def heads(self) -> HeadProjection:
        return self.attention

    def forward(self, x: Tensor, condition: Condition | None, view: View) -> Tensor:
        """`x` `[B, n, D]` to the same, of the tokens that go on; `condition` where the model is conditioned on time."""
        first, second = (None, None) if self.ada_ln is None else self.ada_ln(condition)
        (h,) = view.attention((self,), (modulate(self.attention_norm(x), first),))
        if view.left is not None:
            x = gather_rows(x, view.left)
            first, second = (None if m is None else m.at(view.left) for m in (first, second))
        x = add_branch(x, self._dropped(h), first if self.attention_gate else None)
        (h,) = view.feed_forward((self,), (modulate(self.ffn_norm(x), second),))
        return add_branch(x, self._dropped(h), second)

    def attended(self, mixed: Tensor, entered: Tensor) -> Tensor:
        h = self.attention.out(mixed)
        return h if self.attention_out_norm is None else self.attention_out_norm(h)

    def fed(self, entered: Tensor) -> Tensor:
        h = self.feed_forward(entered)
        return h if self.ffn_out_norm is None else self.ffn_out_norm(h)

    def _dropped(self, h: Tensor) -> Tensor:
        return F.dropout(h, self.dropout, self.training) if self.dropout else h
