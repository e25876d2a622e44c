"""Which keys a query may see, said once by the properties of the tokens, for SDPA and for FlexAttention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


@dataclass(frozen=True)
class Visibility:
    """A query sees the keys of its own sample; with blocks, also by order (block diffusion, arXiv 2503.09573):

        a clean query of block b sees   clean keys of blocks <= b
        a noisy query of block b sees   clean keys of blocks < b, noisy keys of block b

    Attributes:
        sample: int64 `[B, L]`, the token's sample in its row; -1 is padding, which sees nothing and is not seen.
        block: int64 `[B, L]`, the token's block in its sample, or None for no order.
        noisy: bool `[B, L]`, with `block`: False where a row holds the clean copy of a sample.
        alone: every row is one sample, so that without an order padding is all that is not seen.
    """

    sample: Tensor
    block: Tensor | None = None
    noisy: Tensor | None = None
    alone: bool = False

    def __post_init__(self) -> None:
        if (self.block is None) != (self.noisy is None):
            raise ValueError("block and noisy describe block diffusion together; give both, or neither")

    def allows(self, row: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """bool: whether `query` may see `key` in `row`, three broadcastable int64 tensors of indices."""
        own = self.sample[row, query]
        seen = (own == self.sample[row, key]) & (own >= 0)
        if self.block is None or self.noisy is None:
            return seen
        of_key, of_query, noisy = self.block[row, key], self.block[row, query], self.noisy[row, key]
        same = (of_key == of_query) & (noisy == self.noisy[row, query])
        return seen & (same | ((of_key < of_query) & ~noisy))

    def dense(self) -> Tensor:
        """bool `[B, 1, L, L]`, the mask of SDPA: B L^2 bytes. `[B, 1, 1, L]` for rows that are one sample each, where padding sees
        what other queries see: attention takes a fifth less time than with a mask of its own for every query."""
        if self.alone and self.block is None:
            return (self.sample >= 0)[:, None, None]
        rows, length = self.sample.shape
        place = torch.arange(length, device=self.sample.device)
        row = torch.arange(rows, device=self.sample.device)[:, None, None]
        return self.allows(row, place[:, None], place)[:, None]

    def flex(self) -> BlockMask:
        """The mask of FlexAttention: tiles of 128 x 128 in which nothing may be seen are not computed."""
        from torch.nn.attention.flex_attention import create_block_mask

        rows, length = self.sample.shape
        allows = lambda row, head, query, key: self.allows(row, query, key)  # noqa: E731
        return create_block_mask(allows, rows, None, length, length, device=self.sample.device)
