"""Dual cache (Fast-dLLM, Wu et al. 2025, arXiv 2505.22618): only the block is recomputed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from unidiff.decoding.cache.block_refresh import BlockRefresh
from unidiff.decoding.row_decode import RowDecode
from unidiff.decoding.state import DecodeState
from unidiff.models.denoiser import DenoiserTraits


@dataclass
class DualCache(BlockRefresh):
    """Everything before and behind the block keeps the keys and values of the block's first pass.

    Cost of a block of B tokens in a row of S, n passes: 1 + (n - 1) B / S full passes. An approximation: what stands
    around the block does not see what is written into it. Text and image blocks that are decoded in the same pass are
    both recomputed.
    """

    name = "dual"
    # Only the block, everything every 8 passes. (Fast-dLLM, which refreshes once per block of 32, reports 1.3 and 3.5
    # points of GSM8K lost with LLaDA; not measured here.)
    auto: ClassVar[Mapping[str, Mapping[str, Any]]] = {"text": {"interval": 8}}

    def region(self, state: DecodeState, block: Tensor) -> Tensor:
        return block

    def row_region(self, decode: RowDecode, first: int, last: int) -> tuple[int, int]:
        return first, last

    def reference_bound(self, decode: RowDecode, traits: DenoiserTraits) -> float | None:
        """n / (1 + (n - 1) B / S)."""
        if self.interval is not None:
            return None
        n, blocks = float(decode.passes), decode.blocks
        return n * len(blocks) / sum(1 + (n - 1) * size / decode.length for _, size, _ in blocks)
