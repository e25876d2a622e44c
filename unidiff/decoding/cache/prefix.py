"""Prefix cache (Fast-dLLM, Wu et al. 2025, arXiv 2505.22618): the block and all that stands behind it is recomputed."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from unidiff.decoding.cache.refresh import BlockRefresh, first_and_last, places
from unidiff.decoding.state import DecodeState


@dataclass
class PrefixCache(BlockRefresh):
    """What stands before the block keeps the keys and values of the block's first pass.

    Cost of a block that starts at s in a row of S, n passes: 1 + (n - 1) (S - s) / S full passes. For weights trained
    with full attention an approximation; `BlockCausalCache` is the exact form for block-causal ones.
    """

    def region(self, state: DecodeState, block: Tensor) -> Tensor:
        return places(block) >= first_and_last(block)[0]
