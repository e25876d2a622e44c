"""What a decode cost, counted where the work is done."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class DecodeStats:
    """Work of one request; a guidance stream counts as rows.

    Attributes:
        evaluations: network evaluations of a row (`nfe`): passes times streams.
        full_passes, partial_passes, reused_passes: passes that recompute everything, some positions, nothing.
        model_tokens: tokens that went through the layers. head_tokens: positions that went through the head.
    """

    evaluations: int = 0
    full_passes: int = 0
    partial_passes: int = 0
    reused_passes: int = 0
    model_tokens: int = 0
    head_tokens: int = 0
