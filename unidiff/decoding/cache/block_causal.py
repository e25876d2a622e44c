"""The exact cache of block-causal weights (BD3-LM, Arriola et al. 2025, arXiv 2503.09573): append-only prefix."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from unidiff.decoding.cache.base import Policy
from unidiff.decoding.state import DecodeState
from unidiff.models.denoiser import PartialDenoiser
from unidiff.models.partial import CachePlan
from unidiff.models.store import StoreOptions
from unidiff.tokens import TokenBatch


@dataclass
class BlockCausalCache(Policy):
    """Recomputes exactly what a changed token can reach, and nothing beyond the blocks being decoded.

    A token of an attention block sees its own and earlier blocks of its sample. Features therefore stay right until a
    token of the same or an earlier block changes; later blocks are not computed before they are needed. The decode is
    the same as without a cache, whatever the decoding blocks are (the gain is greatest where they are the model's).
    Guidance streams that skip passes catch up when they are used again.
    """

    rotated: bool = True
    _blocks: Tensor | None = field(default=None, init=False, repr=False)  # [B, L], attention block of every position
    _known: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False)

    @property
    def store(self) -> StoreOptions:  # type: ignore[override]
        """Keys and values."""
        return StoreOptions(rotated=self.rotated)

    @property
    def append_only(self) -> bool:  # type: ignore[override]
        """Later blocks are computed when they are reached."""
        return True

    def start(self, batch: TokenBatch, model: Any) -> BlockCausalCache:
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
        request = BlockCausalCache(self.rotated)
        request._blocks = torch.div(batch.positions[..., 0], traits.block_length, rounding_mode="floor")
        return request

    def plan(self, state: DecodeState, candidates: Tensor) -> CachePlan:
        """See `RefreshPolicy.plan`."""
        made: dict[int, tuple[CachePlan, tuple[Tensor, Tensor]]] = {}
        plans: dict[int, CachePlan] = {}
        for stream in state.streams:
            known = self._known.get(stream)
            if id(known) not in made:  # streams that were computed together stay together
                made[id(known)] = self._stream_plan(state, candidates, known)
            plans[stream], self._known[stream] = made[id(known)]
        first = plans.pop(0)
        others = {stream: plan for stream, plan in plans.items() if plan is not first}
        return first.with_streams(others) if others else first

    def _stream_plan(
        self, state: DecodeState, candidates: Tensor, known: tuple[Tensor, Tensor] | None
    ) -> tuple[CachePlan, tuple[Tensor, Tensor]]:
        """The plan of a stream, and (positions with right features `[B, L]`, ids they were computed with `[B, L]`)."""
        assert self._blocks is not None
        blocks, valid, far = self._blocks, state.batch.valid, torch.iinfo(torch.long).max
        right = torch.zeros_like(valid)
        if known is not None:
            changed = (state.ids != known[1]) & valid
            first_changed = torch.where(changed, blocks, far).amin(1, keepdim=True)  # [B, 1]
            right = known[0] & (blocks < first_changed)
        last_wanted = torch.where(candidates, blocks, -1).amax(1, keepdim=True)
        query = valid & (blocks <= last_wanted) & ~right
        return CachePlan(query, candidates, full=False, width=int(query.sum(1).max())), (right | query, state.ids)
