"""What rows of a batch recompute, each by its own count of passes: a row in a batch equals the row alone."""

from __future__ import annotations

from collections.abc import Callable
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
    quota: Callable[[Tensor], Tensor] | None = None,
) -> CachePlan:
    """A plan with this query and verification `[B, L]`; a full one where every row that is not complete is all queried.

    Reads all the numbers that it needs from the device in one go.

    Args:
        quota: how many of n compared positions a layer picks, int64 `[B]` to `[B]`, where that is known beforehand.
    """
    alive = state.open.any(1)
    for clock in state.clocks.values():
        alive = alive | clock.pending
    whole = ((query == state.batch.valid).all(1) | ~alive).all()
    count = query.sum(1)
    numbers = [whole.long(), count.max()]
    if verify is not None:
        compared = (verify & ~query).sum(1)
        numbers += [compared.max(), (count + compared).max()]
        if quota is not None:
            numbers.append((count + quota(compared)).max())
    full, width, *rest = torch.stack(numbers).tolist()
    if full:
        return CachePlan(logits=candidates)
    if not any(rest[:1]):  # nothing to compare
        return CachePlan(query, candidates, full=False, full_layers=full_layers, width=width)
    return CachePlan(query, candidates, False, verify, full_layers, width, rest[1], rest[2] if quota else None)
