"""The exact cache of block-causal weights (BD3-LM, Arriola et al. 2025, arXiv 2503.09573): append-only prefix."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor

from unidiff.decoding.cache.base import StoringPolicy, StreamPlan
from unidiff.decoding.state import DecodeState
from unidiff.models.denoiser import DenoiserTraits, PartialDenoiser
from unidiff.tokens import TokenBatch


@dataclass
class BlockCausalCache(StoringPolicy):
    """Recomputes exactly what a changed token can reach, and nothing beyond the blocks being decoded.

    A token of an attention block sees its own and earlier blocks of its sample. Features therefore stay right until a
    token of the same or an earlier block changes; later blocks are not computed before they are needed. The decode is
    the same as without a cache, whatever the decoding blocks are (the gain is greatest where they are the model's).
    Guidance streams that skip passes catch up when they are used again.
    """

    name = "block-causal"
    append_only = whole_rows = True
    rotated: bool = True
    _blocks: Tensor = field(init=False, repr=False, compare=False)  # [B, L], attention block of every position

    @classmethod
    def exact_for(cls, traits: DenoiserTraits) -> bool:
        return traits.block_length is not None and not traits.timed

    def start(self, batch: TokenBatch, model: Any) -> Self:
        """See `RefreshPolicy.start`.

        Raises:
            ValueError: the model is not block-causal, or its features depend on the time.
        """
        traits = model.traits if isinstance(model, PartialDenoiser) else None
        if traits is None or traits.block_length is None:
            raise ValueError(
                "BlockCausalCache needs a model with attention='block_causal'; use PrefixCache or DualCache"
            )
        if traits.timed:
            raise ValueError("BlockCausalCache is exact only for models that ignore the time; use PrefixCache")
        request = super().start(batch, model)
        request._blocks = torch.div(batch.positions[..., 0], traits.block_length, rounding_mode="floor")
        return request

    def plan_stream(self, state: DecodeState, candidates: Tensor, stream: int, rows: Tensor) -> StreamPlan:
        """See `Policy`. All rows go on together: what is right of a row is known by place, not by pass."""
        notes, valid, far = self.past(state, stream).notes, state.exists, torch.iinfo(torch.long).max
        changed = (state.ids != notes.get("ids", state.ids)) & valid
        first_changed = torch.where(changed, self._blocks, far).amin(1, keepdim=True)  # [B, 1]
        right = notes.get("right", torch.zeros_like(valid)) & (self._blocks < first_changed)
        last_wanted = torch.where(candidates, self._blocks, -1).amax(1, keepdim=True)
        query = valid & (self._blocks <= last_wanted) & ~right & rows.any()  # what nobody uses is not computed
        return StreamPlan(query, torch.zeros_like(rows), notes={"right": right | query, "ids": state.ids})
