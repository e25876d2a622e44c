"""What a decode cost, counted where the work is done."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


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
