"""Blocks of the MM-DiT: joint attention over a text and an image stream, then over both as one sequence.

Streams are `[B, T, D]` for text and `[B, N, D]` for the image; text comes first wherever they are joined.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unidiff.models.attention import attend
from unidiff.models.conditioning import AdaLN, Condition, Modulation, modulate
from unidiff.models.layers import FeedForward, Norm

NORM_EPS = 1e-6


class AxisTables(NamedTuple):
    """cos and sin of every position's angles, `[L, head_dim]`, each value twice in a row (interleaved pairs)."""

    cos: Tensor
    sin: Tensor


def axis_tables(
    positions: Tensor, axes: Sequence[int], theta: float = 1e4, dtype: torch.dtype | None = None
) -> AxisTables:
    """Rotary tables whose head features are split over several position axes.

    Args:
        positions: `[L, A]`, the coordinate on each axis.
        axes: features of each axis, all even; their sum is the head size.
        theta: base; the frequencies of an axis of n features are theta^(-2i/n), computed in float64.
        dtype: of the tables; float32 if None.
    """
    parts = []
    for axis, features in enumerate(axes):
        exponent = torch.arange(0, features, 2, dtype=torch.float64, device=positions.device) / features
        parts.append(positions[:, axis, None].double() * theta**-exponent)  # [L, n/2]
    angles = torch.cat(parts, dim=1).repeat_interleave(2, dim=1)  # [L, head_dim]
    return AxisTables(angles.cos().to(dtype or torch.float32), angles.sin().to(dtype or torch.float32))


def turn(x: Tensor, tables: AxisTables) -> Tensor:
    """Rotate the feature pairs (0, 1), (2, 3), ... of `x` `[B, H, L, d]`; computed in the tables' dtype."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)  # [B, H, L, d/2]
    swapped = torch.stack((-odd, even), dim=-1).flatten(-2)
    return (x * tables.cos + swapped * tables.sin).to(x.dtype)


def plain_norm(x: Tensor) -> Tensor:
    """LayerNorm without scale and bias."""
    return F.layer_norm(x, x.shape[-1:], eps=NORM_EPS)


class HeadProjection(nn.Module):
    """Queries, keys and values of one stream, with RMS norms over each head's queries and keys."""

    def __init__(self, size: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.qkv = nn.Linear(size, 3 * size)
        self.q_norm, self.k_norm = Norm(head_dim, "rms", NORM_EPS), Norm(head_dim, "rms", NORM_EPS)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`[B, L, D]` to three `[B, H, L, d]`."""
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        return self.q_norm(q), self.k_norm(k), v


def mix(q: Tensor, k: Tensor, v: Tensor, rotary: AxisTables) -> Tensor:
    """Rotate, attend, join the heads: `[B, H, L, d]` to `[B, L, D]`."""
    return attend(turn(q, rotary), turn(k, rotary), v, None).transpose(1, 2).flatten(2)


class Stream(nn.Module):
    """What a double block holds for one stream: adaLN, projections, output projection, feed-forward."""

    def __init__(self, size: int, head_dim: int) -> None:
        super().__init__()
        self.ada_ln = AdaLN(size, size, branches=2)
        self.heads = HeadProjection(size, head_dim)
        self.out = nn.Linear(size, size)
        self.feed_forward = FeedForward(size, 4 * size, "gelu_tanh", bias=True)

    def finish(self, x: Tensor, mixed: Tensor, modulations: list[Modulation]) -> Tensor:
        """Both gated residuals of the stream: x += gate out(mixed); x += gate ff(norm(x))."""
        first, second = modulations
        x = x + first.gate * self.out(mixed)
        return x + second.gate * self.feed_forward(modulate(plain_norm(x), second))


class DoubleBlock(nn.Module):
    """Two streams with weights of their own and one attention over [text, image]."""

    def __init__(self, size: int, head_dim: int) -> None:
        super().__init__()
        self.text, self.image = Stream(size, head_dim), Stream(size, head_dim)

    def forward(self, text: Tensor, image: Tensor, condition: Condition, rotary: AxisTables) -> tuple[Tensor, Tensor]:
        streams = ((self.text, text), (self.image, image))
        modulations = [stream.ada_ln(condition) for stream, _ in streams]
        projected = [
            stream.heads(modulate(plain_norm(x), m[0])) for (stream, x), m in zip(streams, modulations, strict=True)
        ]
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(*projected, strict=True))  # [B, H, T + N, d]
        mixed = mix(q, k, v, rotary).split((text.shape[1], image.shape[1]), dim=1)
        return (
            self.text.finish(text, mixed[0], modulations[0]),
            self.image.finish(image, mixed[1], modulations[1]),
        )


class SingleBlock(nn.Module):
    """One sequence, attention and feed-forward side by side: x += gate out([attention(n), gelu(up(n))])."""

    def __init__(self, size: int, head_dim: int) -> None:
        super().__init__()
        self.ada_ln = AdaLN(size, size, branches=1)
        self.heads = HeadProjection(size, head_dim)
        self.up = nn.Linear(size, 4 * size)
        self.out = nn.Linear(5 * size, size)

    def forward(self, x: Tensor, condition: Condition, rotary: AxisTables) -> Tensor:  # [B, T + N, D]
        (modulation,) = self.ada_ln(condition)
        normed = modulate(plain_norm(x), modulation)
        q, k, v = self.heads(normed)
        branches = (mix(q, k, v, rotary), F.gelu(self.up(normed), approximate="tanh"))
        return x + modulation.gate * self.out(torch.cat(branches, dim=-1))
