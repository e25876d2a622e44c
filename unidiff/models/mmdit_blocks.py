"""Blocks of the MM-DiT: joint attention over a text and an image stream, then over both as one sequence.

Streams are `[B, T, D]` for text and `[B, N, D]` for the image; text comes first wherever they are joined. Whole passes and those
over some tokens run the same blocks, with another `View` of the tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unidiff.models.block import AdaLN, Condition, HeadProjection, Parts, Streams, View, add_branch, modulate
from unidiff.models.parts import FeedForward, RotaryTables, gather_rows

NORM_EPS = 1e-6


def axis_tables(
    positions: Tensor, axes: Sequence[int], theta: float = 1e4, dtype: torch.dtype | None = None
) -> RotaryTables:
    """Interleaved rotary tables `[L, 1, head_dim]` whose head features are split over several position axes.

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
    angles = torch.cat(parts, dim=1)[:, None]  # [L, 1, head_dim / 2]
    cos, sin = (x.to(dtype or torch.float32) for x in (angles.cos(), angles.sin()))
    return RotaryTables(cos.repeat_interleave(2, -1), torch.stack((-sin, sin), -1).flatten(-2), interleaved=True)


def plain_norm(x: Tensor) -> Tensor:
    """LayerNorm without scale and bias."""
    return F.layer_norm(x, x.shape[-1:], eps=NORM_EPS)


class TokenStream(nn.Module):
    """A `Stream` of a double block: adaLN, projections, output projection, feed-forward."""

    def __init__(self, size: int, num_heads: int, qk_norm: str = "head") -> None:
        super().__init__()
        self.ada_ln = AdaLN(size, size, branches=2)
        self.heads = _heads(size, num_heads, qk_norm)
        self.out = nn.Linear(size, size)
        self.feed_forward = FeedForward(size, 4 * size, "gelu_tanh", bias=True)

    def attended(self, mixed: Tensor, entered: Tensor) -> Tensor:
        return self.out(mixed)

    def fed(self, entered: Tensor) -> Tensor:
        return self.feed_forward(entered)


class DoubleBlock(nn.Module):
    """Two streams with weights of their own and one attention over [text, image].

    x += gate out(attention); x += gate ff(norm(x)). `qk_norm`: see `HeadProjection`.
    """

    def __init__(self, size: int, num_heads: int, qk_norm: str = "head") -> None:
        super().__init__()
        self.text, self.image = TokenStream(size, num_heads, qk_norm), TokenStream(size, num_heads, qk_norm)

    def forward(self, text: Tensor, image: Tensor, condition: Condition, view: View) -> tuple[Tensor, Tensor]:
        """Both streams to the same."""
        text, image = _run((self.text, self.image), (text, image), condition, (view.attention, view.feed_forward))
        return text, image


class SingleBlock(nn.Module):
    """One sequence, attention and feed-forward side by side: x += gate out([attention(n), gelu(up(n))])."""

    def __init__(self, size: int, num_heads: int) -> None:
        super().__init__()
        self.ada_ln = AdaLN(size, size, branches=1)
        self.heads = _heads(size, num_heads)
        self.up = nn.Linear(size, 4 * size)
        self.out = nn.Linear(5 * size, size)

    def attended(self, mixed: Tensor, entered: Tensor) -> Tensor:
        up = self.up(entered)
        if torch.is_grad_enabled():
            return self.out(torch.cat((mixed, F.gelu(up, approximate="tanh")), dim=-1))
        both, width = up.new_empty(*up.shape[:-1], self.out.in_features), mixed.shape[-1]
        both[..., :width] = mixed
        torch.ops.aten.gelu.out(up, approximate="tanh", out=both[..., width:])
        return self.out(both)

    def fed(self, entered: Tensor) -> Tensor:
        raise NotImplementedError("a single block has one branch")

    def forward(self, x: Tensor, condition: Condition, view: View) -> Tensor:
        """`[B, T + N, D]` to the same, of the tokens that go on."""
        return _run((self,), (x,), condition, (view.attention,), view.left)[0]


def _heads(size: int, num_heads: int, qk_norm: str = "head") -> HeadProjection:
    return HeadProjection(size, num_heads, num_heads, qk_norm, "rms", NORM_EPS, bias=True)


def _run(
    streams: Sequence[TokenStream | SingleBlock],
    parts: Parts,
    condition: Condition,
    branches: Sequence[Callable[[Streams, Parts], Parts]],
    left: Tensor | None = None,
) -> Parts:
    """The branches of a block on the parts `[B, n, D]` of its streams; of the only one to the tokens that are `left`."""
    modulations = [stream.ada_ln(condition) for stream in streams]
    for branch, compute in enumerate(branches):
        own = [m[branch] for m in modulations]
        entered = [modulate(plain_norm(x), m) for x, m in zip(parts, own, strict=True)]
        added = compute(streams, entered)
        parts = parts if left is None else [gather_rows(x, left) for x in parts]
        parts = [add_branch(x, out, m) for x, m, out in zip(parts, own, added, strict=True)]
    return parts
