"""Max-logit cache (ML-Cache of Lumina-DiMOO): positions whose best logit is low are the ones still changing.

After a warm-up of full passes, a pass recomputes only the positions whose largest logit (over their modality's slice,
at their last computation) is low; the others keep keys, values and logits. Every few passes all is recomputed.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from unidiff.decoding.cache.base import COMPAT, Policy, check_settings, check_whole
from unidiff.decoding.cache.rows import Past, plan_rows
from unidiff.decoding.commit.base import ROUNDING
from unidiff.decoding.state import DecodeState
from unidiff.models.partial import CachePlan
from unidiff.models.store import StoreOptions


@dataclass
class MaxLogitCache(Policy):
    """ML-Cache as a refresh policy. Each guidance stream ranks its own logits and keeps its own features.

    With T planned passes of a row (`steps`, or one per token where those are fewer), w = int(T warmup) and pass i of a row from 0, a pass is full where i <= w or (i - w) is a multiple of
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
    _past: dict[int, Past] = field(default_factory=dict, init=False, repr=False)  # by stream
    _seen: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False)  # [B, L], candidates so far

    def __post_init__(self) -> None:
        check_settings(self)
        check_whole("interval", self.interval, 1)
        for name in ("ratio", "warmup"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected a number between 0 and 1")
        if self.compat not in COMPAT:
            raise ValueError(f"compat is {self.compat!r}; expected one of {COMPAT}")
        self.max_logits = "everywhere" if self.compat else "candidates"

    def plan(self, state: DecodeState, candidates: Tensor) -> CachePlan:
        """See `RefreshPolicy.plan`."""
        planned = [torch.where(c.targets.any(1), c.shares.total, 0) for c in state.progress.values()]  # [B] each
        begin = (torch.stack(planned).amax(0).double() * self.warmup).floor().long()
        step = (self._past.get(0) or Past.start(state)).passes
        full = (step <= begin) | ((step - begin) % self.interval == 0)  # [B]
        plans = {stream: self._stream_plan(stream, state, candidates, full) for stream in state.streams}
        own = plans.pop(0)
        return own.with_streams(plans) if plans else own

    def _stream_plan(self, stream: int, state: DecodeState, candidates: Tensor, full: Tensor) -> CachePlan:
        busy, valid = state.users[stream], state.batch.valid
        past = self._past.get(stream) or Past.start(state)
        self._past[stream] = past.after(state, busy)
        # A row may have max_logits of a stream because other rows use it: its own passes count, not those.
        known = self._seen.get(stream, torch.zeros_like(valid))
        self._seen[stream] = known | (candidates & busy[:, None])
        max_logits = state.max_logits.get(stream)  # [B, L], NaN where never seen
        if max_logits is None:
            return CachePlan(logits=candidates)
        if self.compat:
            low = low_max_logits(max_logits, ~max_logits.isnan(), 1 - self.ratio)
        else:
            low = low_max_logits(max_logits, candidates & known, 1 - self.ratio)
            low = low | (candidates & ~known) | (state.ids != past.seen)
        fresh = (full | (past.passes == 0))[:, None]
        return plan_rows(state, torch.where(fresh, valid, low) & busy[:, None], candidates)


def low_max_logits(max_logits: Tensor, counted: Tensor, share: float) -> Tensor:
    """bool `[B, L]`: counted positions not above the `share`-quantile of the row's counted max_logits.

    The quantile interpolates linearly, in float32 as the reference does (in float64 a rank that should be whole may
    differ in the last bit, and with it the count). Peaks that differ from it by rounding alone count as equal to it: a row
    must choose alone as in a batch.
    """
    values = torch.where(counted, max_logits.float(), torch.nan)
    threshold = values.nanquantile(share, dim=1, keepdim=True)  # NaN in a row that counts nothing
    return counted & (values <= threshold + ROUNDING * threshold.abs().clamp_min(1))
