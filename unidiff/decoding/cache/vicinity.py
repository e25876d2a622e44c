"""Vicinity cache (dInfer, arXiv 2510.08666): the block and its neighbourhood are recomputed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from torch import Tensor

from unidiff.decoding.cache.block_refresh import BlockRefresh, first_and_last, places
from unidiff.decoding.row_decode import RowDecode
from unidiff.decoding.state import DecodeState
from unidiff.schema import Between


@dataclass
class VicinityCache(BlockRefresh):
    """A window from `look_back` places before the block to `look_ahead` behind it is recomputed in every pass.

    Between `DualCache` (both 0) and no cache. What is near a block depends on it most. Places count along the row, so
    for images in raster order 16 places are half a line of 32.

    Args:
        look_back, look_ahead: places on either side.
        warmup: dInfer makes the first 4 passes without a cache.
    """

    name = "vicinity"
    warmup: Annotated[int, Between(0)] = 4
    look_back: Annotated[int, Between(0)] = 16
    look_ahead: Annotated[int, Between(0)] = 16

    def region(self, state: DecodeState, block: Tensor) -> Tensor:
        place = places(block)
        first, last = first_and_last(block)
        return (place >= first - self.look_back) & (place <= last + self.look_ahead) & (last >= 0)

    def row_region(self, decode: RowDecode, first: int, last: int) -> tuple[int, int]:
        return max(first - self.look_back, 0), min(last + self.look_ahead, decode.length)
