"""What a decode gave, and what it cost, counted where the work is done."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from unidiff.tokens import TokenBatch


@dataclass
class DecodeStats:
    """Work of one request; a guidance stream counts as rows. Padding of rows and of query indices is work and counts.

    Tokens of a kind of linear layer are summed over the layers: one token that passes through all 8 layers is 8. All
    FLOPs and all tokens by kind are those of a `PartialDenoiser` (see `LayerFlops` for what is left out), 0 for other models.

    Attributes:
        evaluations: network evaluations of a row (`nfe`): passes times streams.
        full_passes, partial_passes, reused_passes: passes that recompute everything, some positions, nothing.
        model_tokens: tokens that went through the layers. head_tokens: positions that went through the head.
        key_tokens, value_tokens, query_tokens: through the parts of the qkv projection; those that asked also went through
            the projection behind attention and the feed-forward. linear_flops: of all these.
        attention_flops: of scores and mixing. head_flops: of the logits.
        store_bytes: most memory that stored features took at once.
        forward_seconds: time in forward passes and head; on an accelerator, the time to launch them.
    """

    evaluations: int = 0
    full_passes: int = 0
    partial_passes: int = 0
    reused_passes: int = 0
    model_tokens: int = 0
    head_tokens: int = 0
    key_tokens: int = 0
    value_tokens: int = 0
    query_tokens: int = 0
    linear_flops: int = 0
    attention_flops: int = 0
    head_flops: int = 0
    store_bytes: int = 0
    forward_seconds: float = 0.0

    @property
    def flops(self) -> int:
        """Layers, attention and head together."""
        return self.linear_flops + self.attention_flops + self.head_flops

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able data, the sum of all FLOPs included."""
        return {**asdict(self), "flops": self.flops}


@dataclass(frozen=True)
class SamplerOutput:
    """A finished decode.

    Attributes:
        batch: the request with every target filled.
        confidence: float32 `[B, L]`, probability of each decoded token when it was committed (guided, at temperature 1,
            before filters); 1 at known tokens and end-of-text fill.
        nfe: network evaluations of a row; a guided pass counts once per stream. seconds: wall-clock time.
        trajectory: int64 `[B, L]` ids, all hidden first, then after each pass; None unless recorded.
        steps: passes of the loop, those that needed no forward included. stats: what the decode cost.
        tokens_per_forward: float64 `[B]`, decoded tokens of a row (not what fills it up behind an end) per pass that it took part in.
    """

    batch: TokenBatch
    confidence: Tensor
    nfe: int
    seconds: float
    trajectory: list[Tensor] | None = None
    steps: int = 0
    stats: DecodeStats = field(default_factory=DecodeStats)
    tokens_per_forward: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.double))
