"""One layer of the masked transformer: attention and feed-forward, on all positions of a row or on those of a pass."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn
from torch.nn import functional as F

from unidiff.models.attention import Attention, AttentionMask, attend
from unidiff.models.conditioning import AdaLN, Condition, Modulation, gate, modulate
from unidiff.models.config import TransformerConfig
from unidiff.models.layers import FeedForward, Norm
from unidiff.models.rotary import RotaryTables


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
