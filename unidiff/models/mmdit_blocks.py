"""Blocks of the MM-DiT: joint attention over a text and an image stream, then over both as one sequence.

Streams are `[B, T, D]` for text and `[B, N, D]` for the image; text comes first wherever they are joined. Whole passes and those
over some tokens run the same blocks, with another `StreamView` of the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unidiff.models.block import AdaLN, Condition, FeedForward, Norm, attend, modulate

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
    """Rotate the feature pairs (0, 1), (2, 3), ... of `x` `[..., d]` by tables that fit it; computed in the tables' dtype."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)  # [..., d/2]
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
        """`[B, n, D]` to three `[B, n, H, d]`."""
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in self.qkv(x).chunk(3, dim=-1))
        return self.q_norm(q), self.k_norm(k), v

    def query_key(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys alone."""
        both = self._rows(x, 0, 2 * x.shape[-1])
        q, k = (part.unflatten(-1, (-1, self.head_dim)) for part in both.chunk(2, dim=-1))
        return self.q_norm(q), self.k_norm(k)

    def value(self, x: Tensor) -> Tensor:
        """Values alone."""
        return self._rows(x, 2 * x.shape[-1], None).unflatten(-1, (-1, self.head_dim))

    def _rows(self, x: Tensor, start: int, stop: int | None) -> Tensor:
        return F.linear(x, self.qkv.weight[start:stop], self.qkv.bias[start:stop])


class Stream(nn.Module):
    """What a double block holds for one stream: adaLN, projections, output projection, feed-forward."""

    def __init__(self, size: int, head_dim: int) -> None:
        super().__init__()
        self.ada_ln = AdaLN(size, size, branches=2)
        self.heads = HeadProjection(size, head_dim)
        self.out = nn.Linear(size, size)
        self.feed_forward = FeedForward(size, 4 * size, "gelu_tanh", bias=True)

    def attended(self, mixed: Tensor, entered: Tensor) -> Tensor:
        """Output of the first branch from what attention mixed, and from the branch's input; all `[B, n, D]`."""
        return self.out(mixed)


class DoubleBlock(nn.Module):
    """Two streams with weights of their own and one attention over [text, image].

    x += gate out(attention); x += gate ff(norm(x)).
    """

    def __init__(self, size: int, head_dim: int) -> None:
        super().__init__()
        self.text, self.image = Stream(size, head_dim), Stream(size, head_dim)

    def forward(self, text: Tensor, image: Tensor, condition: Condition, view: StreamView) -> tuple[Tensor, Tensor]:
        """Both streams to the same."""
        text, image = _run((self.text, self.image), (text, image), condition, view)
        return text, image


class SingleBlock(nn.Module):
    """One sequence, attention and feed-forward side by side: x += gate out([attention(n), gelu(up(n))])."""

    def __init__(self, size: int, head_dim: int) -> None:
        super().__init__()
        self.ada_ln = AdaLN(size, size, branches=1)
        self.heads = HeadProjection(size, head_dim)
        self.up = nn.Linear(size, 4 * size)
        self.out = nn.Linear(5 * size, size)

    def attended(self, mixed: Tensor, entered: Tensor) -> Tensor:
        """See `Stream.attended`."""
        return self.out(torch.cat((mixed, F.gelu(self.up(entered), approximate="tanh")), dim=-1))

    def forward(self, x: Tensor, condition: Condition, view: StreamView) -> Tensor:
        """`[B, T + N, D]` to the same."""
        return _run((self,), (x,), condition, view)[0]


Streams = Sequence[Stream | SingleBlock]


class StreamView(Protocol):
    """What the branches of a block see and compute; inputs and outputs `[B, n, D]` of each stream."""

    def attention(self, streams: Streams, entered: Sequence[Tensor]) -> Sequence[Tensor]:
        """The first branch, before gate and residual add."""
        ...

    def feed_forward(self, streams: Streams, entered: Sequence[Tensor]) -> Sequence[Tensor]:
        """The second branch, where there is one."""
        ...


@dataclass
class WholeView:
    """`StreamView` of a pass over all tokens; `rotary` fits their queries and keys `[B, n, H, d]`."""

    rotary: AxisTables

    def attention(self, streams: Streams, entered: Sequence[Tensor]) -> Sequence[Tensor]:
        projected = zip(*(stream.heads(h) for stream, h in zip(streams, entered, strict=True)), strict=True)
        q, k, v = (joined(part) for part in projected)  # [B, n, H, d]
        seen = self.seen(turn(k, self.rotary), v)
        return attended(streams, turn(q, self.rotary), *seen, entered)

    def seen(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """From rotated keys and values `[B, n, H, d]` of this pass to those attended to, `[B, H, L, d]`."""
        return key.transpose(1, 2), value.transpose(1, 2)

    def feed_forward(self, streams: Streams, entered: Sequence[Tensor]) -> Sequence[Tensor]:
        return fed(streams, entered)


def _run(streams: Streams, parts: Sequence[Tensor], condition: Condition, view: StreamView) -> Sequence[Tensor]:
    """A block on the parts `[B, n, D]` of its streams."""
    modulations = [stream.ada_ln(condition) for stream in streams]
    for branch, compute in enumerate((view.attention, view.feed_forward)[: len(modulations[0])]):
        own = [m[branch] for m in modulations]
        entered = [modulate(plain_norm(x), m) for x, m in zip(parts, own, strict=True)]
        parts = [x + m.gate * out for x, m, out in zip(parts, own, compute(streams, entered), strict=True)]
    return parts


def attended(streams: Streams, q: Tensor, k: Tensor, v: Tensor, entered: Sequence[Tensor]) -> list[Tensor]:
    """First branch of each stream from queries `[B, n, H, d]`, and keys and values `[B, H, L, d]`."""
    mixed = attend(q.transpose(1, 2), k, v, None).transpose(1, 2).flatten(2)  # [B, n, D]
    own = mixed.split([h.shape[1] for h in entered], dim=1)
    return [stream.attended(part, h) for stream, part, h in zip(streams, own, entered, strict=True)]


def fed(streams: Streams, entered: Sequence[Tensor]) -> list[Tensor]:
    """Second branch of each stream that has one."""
    return [s.feed_forward(h) for s, h in zip(streams, entered, strict=True) if isinstance(s, Stream)]


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Streams `[B, n, ...]` one behind the other."""
    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts), dim=1)
