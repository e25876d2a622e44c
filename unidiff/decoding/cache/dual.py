"""Dual cache (Fast-dLLM, Wu et al. 2025, arXiv 2505.22618): only the block is recomputed."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from unidiff.decoding.cache.refresh import BlockRefresh
from unidiff.decoding.state import DecodeState


@dataclass
class DualCache(BlockRefresh):
    """Everything before and behind the block keeps the keys and values of the block's first pass.

    Cost of a block of B tokens in a row of S, n passes: 1 + (n - 1) B / S full passes. An approximation: what stands
    around the block does not see what is written into it. Text and image blocks that are decoded in the same pass are
    both recomputed.
    """

    def region(self, state: DecodeState, block: Tensor) -> Tensor:
        return block
