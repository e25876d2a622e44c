"""Max-logit cache (ML-Cache of Lumina-DiMOO): positions whose best logit is low are the ones still changing.

After a warm-up of full passes, a pass recomputes only the positions whose largest logit (over their modality's slice,
at their last computation) is low; the others keep keys, values and logits. Every few passes all is recomputed.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from unidiff.decoding.policies.base import COMPAT, Policy, check_whole
from unidiff.decoding.state import DecodeState
from unidiff.models.partial import CachePlan
from unidiff.models.store import StoreOptions


@dataclass
class MaxLogitCache(Policy):
    """ML-Cache as a refresh policy. Each guidance stream ranks its own logits and keeps its own features.

    With T passes, w = int(T warmup) and pass i from 0, a pass is full where i <= w or (i - w) is a multiple of
    `interval`; the defaults make 28 of 64 passes full, so at most a speed-up of 2.03.

    Args:
        ratio: share of the positions that keep their features in a partial pass.
        warmup: share of the passes, at the beginning, that recompute everything.
        interval: passes between two full ones afterwards; 1 is no cache.
        compat: None, or "upstream" for the reference implementation: the share is taken of the whole row, prompt and
            decoded tokens included, and a just-revealed token whose logit was high is not recomputed. By default only
            undecoded positions that may be filled now count, and changed tokens are always recomputed.

    Raises:
        ValueError: a setting outside its range.
    """

    ratio: float = 0.9
    warmup: float = 0.3
    interval: int = 5
    compat: str | None = None
    store = StoreOptions()
    _passes: int = field(default=0, init=False, repr=False)
    _seen: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        check_whole("interval", self.interval, 1)
        for name in ("ratio", "warmup"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected a number between 0 and 1")
        if self.compat not in COMPAT:
            raise ValueError(f"compat is {self.compat!r}; expected one of {COMPAT}")
        self.peaks = "everywhere" if self.compat else "candidates"

    def plan(self, state: DecodeState, candidates: Tensor) -> CachePlan:
        """See `RefreshPolicy.plan`."""
        step, self._passes = self._passes, self._passes + 1
        begin = int(max(clock.settings.steps for clock in state.clocks.values()) * self.warmup)
        full = step <= begin or (step - begin) % self.interval == 0
        plans = {stream: self._stream_plan(stream, state, candidates, full) for stream in {0, *state.streams}}
        return plans.pop(0).with_streams(plans)

    def _stream_plan(self, stream: int, state: DecodeState, candidates: Tensor, full: bool) -> CachePlan:
        seen, self._seen[stream] = self._seen.get(stream), state.ids
        if full or seen is None or stream not in state.peaks:
            return CachePlan(logits=candidates)
        peaks = state.peaks[stream]  # [B, L], NaN where never seen
        known = ~peaks.isnan()
        if self.compat:
            return CachePlan(low_peaks(peaks, known, 1 - self.ratio), candidates, full=False)
        query = low_peaks(peaks, candidates & known, 1 - self.ratio)
        query = query | (candidates & ~known) | (state.ids != seen)
        return CachePlan(query, candidates, full=False)


def low_peaks(peaks: Tensor, counted: Tensor, share: float) -> Tensor:
    """bool `[B, L]`: counted positions not above the `share`-quantile of the row's counted peaks.

    The quantile interpolates linearly, in float32 as the reference does (in float64 a rank that should be whole may
    differ in the last bit, and with it the count).
    """
    values = torch.where(counted, peaks.float(), torch.nan)
    threshold = values.nanquantile(share, dim=1, keepdim=True)  # NaN in a row that counts nothing
    return counted & (values <= threshold)
