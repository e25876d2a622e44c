"""Prefix cache (Fast-dLLM, Wu et al. 2025, arXiv 2505.22618): the block and all that stands behind it is recomputed."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from unidiff.decoding.cache.block_refresh import BlockRefresh, first_and_last, places
from unidiff.decoding.row_decode import RowDecode
from unidiff.decoding.state import DecodeState
from unidiff.models.denoiser import DenoiserTraits


@dataclass
class PrefixCache(BlockRefresh):
    """What stands before the block keeps the keys and values of the block's first pass.

    Cost of a block that starts at s in a row of S, n passes: 1 + (n - 1) (S - s) / S full passes. For weights trained
    with full attention an approximation; `BlockCausalCache` is the exact form for block-causal ones.
    """

    name = "prefix"

    def region(self, state: DecodeState, block: Tensor) -> Tensor:
        return places(block) >= first_and_last(block)[0]

    def row_region(self, decode: RowDecode, first: int, last: int) -> tuple[int, int]:
        return first, decode.length

    def reference_bound(self, decode: RowDecode, traits: DenoiserTraits) -> float | None:
        """Over blocks from s, sum n / sum (1 + (n - 1) (S - s) / S)."""
        if self.interval is not None:
            return None
        n, blocks, length = float(decode.passes), decode.blocks, decode.length
        return n * len(blocks) / sum(1 + (n - 1) * (length - s) / length for s, _, _ in blocks)
