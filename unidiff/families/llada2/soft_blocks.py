"""A defect of LLaDA2.1's program, for comparisons: blocks of attention that hide nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from unidiff.decoding.cache.base import Policy
from unidiff.decoding.state import DecodeState
from unidiff.models.denoiser import CachePlan
from unidiff.models.transformer import MaskedTransformer, block_causal_mask
from unidiff.tokens import TokenBatch


class SoftBlocks:
    """A block-causal network whose table of blocks, 1 where a query may see a key and 0 elsewhere, is added to the scores of
    attention, so that finished blocks see later ones. Blocks behind `window` are not fed at all.

    Args:
        model: the network.
    Attributes:
        window: int64 `[B]`, the last block of each row that is fed; None for all.
    """

    def __init__(self, model: MaskedTransformer) -> None:
        self.model = model
        self.window: Tensor | None = None

    def hidden(
        self,
        ids: Tensor,
        modality: Tensor,
        positions: Tensor,
        attention_mask: Tensor | None = None,
        time: Tensor | None = None,
    ) -> Tensor:
        """See `Denoiser`."""
        block = self.model.settings.block_length
        assert block is not None  # of LLaDA2
        index = positions[..., 0]
        scores = block_causal_mask(index, block, None).to(self.model.dtype)  # [B, 1, L, L]
        seen = torch.ones_like(index, dtype=torch.bool)[:, None, None]
        if attention_mask is not None:
            seen = seen & attention_mask
        if self.window is not None:
            window = self.window.repeat(len(ids) // len(self.window))[:, None]
            seen = seen & (torch.div(index, block, rounding_mode="floor") <= window)[:, None, None]
        return self.model.hidden(ids, modality, positions, scores.masked_fill(~seen, -torch.inf), time)

    def head(self, hidden: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """See `Denoiser`."""
        return self.model.head(hidden, start, stop)


class BlockWindow(Policy):
    """Full passes up to the block of attention that is decoded, which it tells the network."""

    def __init__(self, model: SoftBlocks) -> None:
        self.model = model

    def start(self, batch: TokenBatch, model: Any) -> BlockWindow:
        self.model.window = None
        return self

    def plan(self, state: DecodeState, candidates: Tensor) -> CachePlan:
        index, length = state.batch.positions[..., 0], self.model.model.settings.block_length or 1
        last = torch.where(candidates, torch.div(index, length, rounding_mode="floor"), -1).amax(1)
        known = last if self.model.window is None else self.model.window
        self.model.window = torch.where(last >= 0, last, known)
        return CachePlan(logits=candidates, every_row=True)
