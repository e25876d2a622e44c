"""Adaptive feature cache (dLLM-Cache, Liu et al. 2025, arXiv 2506.06295): prompt and response age at different rates.

The prompt is recomputed every `prompt_interval` passes, the response every `response_interval`. In between, every layer
renews the values V of the response and compares them with the stored ones (V-verify, eq. 5 of the paper): the share
`ratio` whose cosine is lowest is recomputed, the others keep what attention and feed-forward gave them last.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from unidiff.decoding.cache.base import COMPAT, Policy, check_settings, check_whole
from unidiff.decoding.cache.rows import Past, plan_rows
from unidiff.decoding.commit.base import take_best
from unidiff.decoding.state import DecodeState
from unidiff.models.partial import CachePlan
from unidiff.models.store import StoreOptions


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

    Raises:
        ValueError: a setting outside its range.
    """

    prompt_interval: int = 50
    response_interval: int = 7
    ratio: float = 0.25
    full_layers: tuple[int, ...] = (0,)
    compat: str | None = None
    store = StoreOptions(outputs=True)
    _past: dict[int, Past] = field(default_factory=dict, init=False, repr=False)  # by stream

    def __post_init__(self) -> None:
        check_settings(self)
        for name in ("prompt_interval", "response_interval"):
            check_whole(name, getattr(self, name), 1)
        if not 0 <= self.ratio <= 1:
            raise ValueError(f"ratio is {self.ratio!r}; expected a number between 0 and 1")
        if self.compat not in COMPAT:
            raise ValueError(f"compat is {self.compat!r}; expected one of {COMPAT}")
        self.full_layers = tuple(self.full_layers)

    def plan(self, state: DecodeState, candidates: Tensor) -> CachePlan:
        """See `RefreshPolicy.plan`."""
        begin = self._past.get(0)
        own = self._stream_plan(0, state, candidates)
        others: dict[int, CachePlan] = {}
        for stream in state.streams:
            if stream == 0:
                continue
            if self._past.get(stream) is begin and torch.equal(state.users[stream], state.users[0]):
                self._past[stream] = self._past[0]  # in step with the conditional stream: they run together
            else:
                others[stream] = self._stream_plan(stream, state, candidates)
        return own.with_streams(others) if others else own

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

    def _stream_plan(self, stream: int, state: DecodeState, candidates: Tensor) -> CachePlan:
        """What the rows of one stream recompute in their next pass, by their own counters."""
        batch, busy = state.batch, state.users[stream]
        past = self._past.get(stream) or Past.start(state)
        self._past[stream] = past.after(state, busy)
        prompt, response = batch.valid & batch.given, batch.targets
        whole_prompt, whole_response = (
            (busy & (past.passes % interval == 0))[:, None]
            for interval in (self.prompt_interval, self.response_interval)
        )
        query = (prompt & whole_prompt) | (response & whole_response)
        if self.compat is None:
            query = query | ((batch.ids != past.seen) & busy[:, None])
        verify = None
        if self.ratio > 0:
            verify = (response if self.compat else state.masked) & ~whole_response & busy[:, None]
        return plan_rows(state, query, candidates, verify, self.full_layers, self.quota)
