"""Max-logit cache (ML-Cache of Lumina-DiMOO): positions whose best logit is low are the ones still changing.

After a warm-up of full passes, a pass recomputes only the positions whose largest logit (over their modality's slice,
at their last computation) is low; the others keep keys, values and logits. Every few passes all is recomputed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import torch
from torch import Tensor

from unidiff.decoding.cache.base import Compat, Policy, StreamPlan
from unidiff.decoding.commit.base import ROUNDING
from unidiff.decoding.row_decode import RowDecode, RowMoment, RowWork
from unidiff.decoding.state import DecodeState
from unidiff.models.denoiser import DenoiserTraits
from unidiff.models.store import StoreOptions
from unidiff.schema import Between
from unidiff.tokens import Modality


@dataclass
class MaxLogitCache(Policy):
    """ML-Cache as a refresh policy. Each guidance stream ranks its own logits and keeps its own features.

    With T planned passes of a row (`steps`, or one per token where those are fewer), w = int(T warmup) and pass i of a row
    from 0, a pass is full where i <= w or (i - w) is a multiple of `interval`; the defaults make 28 of 64 passes full, so
    at most a speed-up of 2.03.

    Args:
        ratio: share of the positions that keep their features in a partial pass.
        warmup: share of the passes, at the beginning, that recompute everything.
        interval: passes between two full ones afterwards; 1 is no cache.
        compat: None, or "upstream" for the reference implementation: the share is taken of the whole row, prompt and
            decoded tokens included, and a just-revealed token whose logit was high is not recomputed. By default only
            undecoded positions that may be filled now count, and changed tokens are always recomputed.
    """

    name = "max-logit"
    store = StoreOptions()
    by_stream = True
    ratio: Annotated[float, Between(0, 1)] = 0.9
    warmup: Annotated[float, Between(0, 1)] = 0.3
    interval: Annotated[int, Between(1)] = 5
    compat: Compat = None
    _full: Tensor = field(init=False, repr=False, compare=False)  # bool [B], rows whose pass is full

    def __post_init__(self) -> None:
        super().__post_init__()
        self.max_logits = "everywhere" if self.compat else "candidates"
        self.reads_shown = not self.compat

    def begin_pass(self, state: DecodeState, candidates: Tensor) -> Tensor:
        planned = [torch.where(p.targets.any(1), p.shares.total, 0) for p in state.progress.values()]  # [B] each
        begin = (torch.stack(planned).amax(0).double() * self.warmup).floor().long()
        step = self.past(state).passes
        self._full = (step <= begin) | ((step - begin) % self.interval == 0)
        return candidates

    def plan_stream(self, state: DecodeState, candidates: Tensor, stream: int, rows: Tensor) -> StreamPlan:
        past, valid = self.past(state, stream), state.batch.valid
        # A row may have logits of a stream because other rows use it: its own passes count, not those.
        known = past.notes.get("known", torch.zeros_like(valid))  # candidates so far
        notes = {"known": known | (candidates & rows[:, None])}
        top = state.max_logits.get(stream)  # [B, L], NaN where never seen
        if top is None:
            return StreamPlan(valid, torch.ones_like(rows), notes=notes)
        if self.compat:
            low = low_max_logits(top, ~top.isnan(), 1 - self.ratio)
        else:
            low = low_max_logits(top, candidates & known, 1 - self.ratio)
            low = low | (candidates & ~known) | (state.ids != past.seen)
        fresh = (self._full | (past.passes == 0))[:, None]
        return StreamPlan(torch.where(fresh, valid, low) & rows[:, None], notes=notes)

    def row_work(self, decode: RowDecode, now: RowMoment, layers: int) -> RowWork:
        begin = int(max(sum(decode.passes_of(modality)) for modality in Modality) * self.warmup)
        queries, head = decode.length, now.masked + (decode.length if self.compat else 0)  # logits everywhere
        if now.number > begin and (now.number - begin) % self.interval:
            counted = decode.length if self.compat else now.masked
            rank = torch.tensor(1 - self.ratio, dtype=torch.float32) * (counted - 1)  # as nanquantile counts
            queries = int(rank) + 1
            if not self.compat:  # candidates of a new block have no logits yet
                queries = (queries if now.inside else now.masked) + now.changed
        return RowWork.even(layers, queries, decode.length, head, now.ids)

    def reference_bound(self, decode: RowDecode, traits: DenoiserTraits) -> float | None:
        """n / (full + (n - full) (1 - ratio))."""
        total = sum(decode.steps(modality) for modality in Modality)
        begin = int(total * self.warmup)
        full = sum(i <= begin or (i - begin) % self.interval == 0 for i in range(total))
        return total / (full + (total - full) * (1 - self.ratio))


def low_max_logits(max_logits: Tensor, counted: Tensor, share: float) -> Tensor:
    """bool `[B, L]`: counted positions not above the `share`-quantile of the row's counted max_logits.

    The quantile interpolates linearly, in float32 as the reference does (in float64 a rank that should be whole may
    differ in the last bit, and with it the count). Peaks that differ from it by rounding alone count as equal to it: a row
    must choose alone as in a batch.
    """
    values = torch.where(counted, max_logits.float(), torch.nan)
    threshold = values.nanquantile(share, dim=1, keepdim=True)  # NaN in a row that counts nothing
    return counted & (values <= threshold + ROUNDING * threshold.abs().clamp_min(1))
