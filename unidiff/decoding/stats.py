"""What a pass costs in FLOPs, and what a decode cost, counted where the work is done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from unidiff.models.denoiser import DenoiserTraits
from unidiff.models.partial import LayerWork


@dataclass
class DecodeStats:
    """Work of one request; a guidance stream counts as rows.

    Tokens of a kind of linear layer are summed over the layers: one token that passes through all 8 layers is 8. All
    FLOPs and all tokens by kind are those of a `PartialDenoiser` (see `LayerFlops` for what is left out) and stay 0
    for other models. Padding of rows and of query indices is work and counts.

    Attributes:
        evaluations: network evaluations of a row (`nfe`): passes times streams.
        full_passes, partial_passes, reused_passes: passes that recompute everything, some positions, nothing.
        model_tokens: tokens that went through the layers. head_tokens: positions that went through the head.
        query_key_tokens, value_tokens: through the parts of the qkv projection, which may differ in one layer.
        output_tokens: through the projection behind attention. ffn_tokens: through the feed-forward.
        linear_flops: of these four. attention_flops: of scores and mixing. head_flops: of the logits.
        store_bytes: most memory that stored features took at once.
        forward_seconds: time in forward passes and head; on an accelerator, the time to launch them.
    """

    evaluations: int = 0
    full_passes: int = 0
    partial_passes: int = 0
    reused_passes: int = 0
    model_tokens: int = 0
    head_tokens: int = 0
    query_key_tokens: int = 0
    value_tokens: int = 0
    output_tokens: int = 0
    ffn_tokens: int = 0
    linear_flops: int = 0
    attention_flops: int = 0
    head_flops: int = 0
    store_bytes: int = 0
    forward_seconds: float = 0.0

    @property
    def flops(self) -> int:
        """Layers, attention and head together."""
        return self.linear_flops + self.attention_flops + self.head_flops

    def count_layers(self, traits: DenoiserTraits, work: Sequence[LayerWork], rows: int, keys: int) -> None:
        """Add a pass of `rows` rows whose queries look at `keys` keys each; `work` has one entry per layer."""
        for layer, w in zip(traits.layers, work, strict=True):
            self.query_key_tokens += rows * w.qk
            self.value_tokens += rows * w.v
            self.output_tokens += rows * w.out
            self.ffn_tokens += rows * w.out
            self.linear_flops += rows * layer.linear(w)
            self.attention_flops += rows * layer.attention(w, keys)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able data, the sum of all FLOPs included."""
        return {**asdict(self), "flops": self.flops}
