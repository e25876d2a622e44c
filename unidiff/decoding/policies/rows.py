"""What rows of a batch recompute, each by its own count of passes: a row in a batch equals the row alone."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from unidiff.decoding.state import DecodeState
from unidiff.models.partial import CachePlan


class Past(NamedTuple):
    """What the rows of a guidance stream did so far.

    passes: int64 `[B]`, those that the row had a use for. seen: int64 `[B, L]`, the ids in the last of them.
    """

    passes: Tensor
    seen: Tensor

    @classmethod
    def start(cls, state: DecodeState) -> Past:
        return cls(torch.zeros_like(state.ids[:, 0]), state.ids)

    def after(self, state: DecodeState, busy: Tensor) -> Past:
        """With the coming pass, in which the rows `busy` `[B]` take part."""
        return Past(self.passes + busy.long(), torch.where(busy[:, None], state.ids, self.seen))


def plan_rows(
    state: DecodeState,
    query: Tensor,
    candidates: Tensor,
    verify: Tensor | None = None,
    full_layers: tuple[int, ...] = (),
) -> CachePlan:
    """A plan with this query and verification `[B, L]`; a full one where every row that is not complete is all queried.

    Reads three numbers from the device, in one go.
    """
    alive = state.open.any(1)
    for clock in state.clocks.values():
        alive = alive | clock.pending
    whole = ((query == state.batch.valid).all(1) | ~alive).all()
    compared = torch.zeros_like(whole) if verify is None else verify.any()
    full, verified, width = torch.stack([whole.long(), compared.long(), query.sum(1).max()]).tolist()
    if full:
        return CachePlan(logits=candidates)
    return CachePlan(query, candidates, False, verify if verified else None, full_layers, width)
