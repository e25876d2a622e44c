"""Adaptive feature cache (dLLM-Cache, Liu et al. 2025, arXiv 2506.06295): prompt and response age at different rates.

The prompt is recomputed every `prompt_interval` passes, the response every `response_interval`. In between, every layer
renews the values V of the response and compares them with the stored ones (V-verify, eq. 5 of the paper): the share
`ratio` whose cosine is lowest is recomputed, the others keep what attention and feed-forward gave them last.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from unidiff.decoding.cache.base import Compat, Policy, StreamPlan
from unidiff.decoding.commit.base import take_best
from unidiff.decoding.row_decode import RowDecode, RowMoment, RowWork
from unidiff.decoding.state import DecodeState
from unidiff.models.denoiser import DenoiserTraits, LayerWork
from unidiff.models.store import StoreOptions
from unidiff.schema import Between


@dataclass
class AdaptiveCache(Policy):
    """dLLM-Cache as a refresh policy. Each row of each guidance stream has a counter and features of its own.

    Cost of a pass with P prompt and G response tokens, on average: P / prompt_interval + G / response_interval
    + G (1 - 1 / response_interval) (ratio + (1 - ratio) v) tokens, v being the share of V in a layer's work, and
    layer 0 in full with `full_layers=(0,)`. What it gains grows with the length of the prompt.

    Args:
        prompt_interval: passes between two refreshes of the given tokens; 1 recomputes them in every pass.
        response_interval: the same for the targets. With both at 1 this is no cache.
        ratio: share of the compared positions that every layer recomputes between refreshes; 0 compares nothing.
        full_layers: layers that recompute every position in every pass. The values of layer 0 depend on the token
            alone, so comparing them says nothing; MMaDA's hook passes ().
        compat: None, or "upstream" for the reference implementation: the share is taken of the whole response, decoded
            tokens and later blocks included, and tokens that changed are not recomputed for that reason. By default
            only undecoded positions are compared and count, and changed tokens are always recomputed.
    """

    name = "adaptive"
    foretold = True
    store = StoreOptions(outputs=True)
    prompt_interval: Annotated[int, Between(1)] = 50
    response_interval: Annotated[int, Between(1)] = 7
    ratio: Annotated[float, Between(0, 1)] = 0.25
    full_layers: tuple[int, ...] = (0,)
    compat: Compat = None

    def __post_init__(self) -> None:
        if isinstance(self.full_layers, list):
            self.full_layers = tuple(self.full_layers)
        super().__post_init__()

    def select(self, layer: int, similarity: Tensor) -> Tensor | None:
        """The floor(ratio n) least similar of the n compared positions of each row.

        At least one by default, and earlier positions first among those that are equal but for rounding: values that did
        not change differ by rounding alone, and a row alone must choose as in a batch.

        Args:
            similarity: cosine `[B, L]`, NaN where nothing was compared.
        """
        compared = ~similarity.isnan()
        near = 1e-6 if similarity.dtype == torch.float32 else 1e-12
        return take_best(
            -similarity.nan_to_num(), compared, self.quota(compared.sum(1)), lambda least: torch.full_like(least, near)
        )

    def quota(self, n: Tensor) -> Tensor:
        """How many of n compared positions a layer recomputes, int64."""
        share = (n.double() * self.ratio).floor().long()
        return share if self.compat else torch.maximum(share, (n > 0).long())

    def plan_stream(self, state: DecodeState, candidates: Tensor, stream: int, rows: Tensor) -> StreamPlan:
        batch, past = state.batch, self.past(state, stream)
        prompt, response = batch.valid & batch.given, batch.targets
        whole_prompt, whole_response = (
            (rows & (past.passes % interval == 0))[:, None]
            for interval in (self.prompt_interval, self.response_interval)
        )
        query = (prompt & whole_prompt) | (response & whole_response)
        if self.compat is None:
            query = query | ((batch.ids != past.seen) & rows[:, None])
        verify = None
        if self.ratio > 0:
            verify = (response if self.compat else state.masked) & ~whole_response & rows[:, None]
        return StreamPlan(query, None, verify, self.full_layers, self.quota)

    def row_work(self, decode: RowDecode, now: RowMoment, layers: int) -> RowWork:
        prompt = decode.prompt if now.number % self.prompt_interval == 0 else 0
        if now.number % self.response_interval == 0:
            queries = values = prompt + decode.targets
        else:
            known = prompt + (0 if self.compat else now.changed)
            compared = (decode.targets if self.compat else now.left) if self.ratio > 0 else 0
            queries, values = known + int(self.quota(torch.tensor(compared))), known + compared
        whole, some = LayerWork(*(decode.length,) * 3), LayerWork(queries, values, queries)
        work = tuple(whole if layer in self.full_layers else some for layer in range(layers))
        return RowWork(work, decode.length, now.masked, now.ids)

    def reference_bound(self, decode: RowDecode, traits: DenoiserTraits) -> float | None:
        """S / (P / Kp + G / Kr + G (1 - 1 / Kr) (rho + (1 - rho) v)) with v = 2 d d_kv / c, in all layers but the full ones."""
        layer, answer, rho = traits.layers[0], decode.targets, self.ratio
        between = answer * (1 - 1 / self.response_interval) * (rho + (1 - rho) * layer.value / layer.token)
        share = (decode.prompt / self.prompt_interval + answer / self.response_interval + between) / decode.length
        full = len(self.full_layers) / len(traits.layers)
        return 1 / (full + (1 - full) * share)
