"""What rows of a batch recompute, each by its own count of passes: a row in a batch equals the row alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
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


class Part(NamedTuple):
    """What some positions of a batch do.

    where: bool `[B, L]`. plan: of one stream, see `CachePlan`. rows: bool `[B]` with any such position; None where all have.
    """

    where: Tensor
    plan: CachePlan
    rows: Tensor | None


def merged(state: DecodeState, shown: Tensor, busy: Tensor, parts: Sequence[Part]) -> CachePlan:
    """One plan of what all parts recompute in the rows `busy` `[B]`; no position does what a part asks that it is not in."""
    query, verify = torch.zeros_like(shown), None
    layers: dict[int, Tensor | None] = {}  # bool [B], rows that a layer recomputes in full; None for all
    for where, plan, rows in parts:
        asked = where
        if plan.query is not None:
            asked = where & (plan.query if plan.fresh is None else plan.query | plan.fresh[:, None])
        query = query | asked
        if plan.verify is not None:
            compared = plan.verify & where
            verify = compared if verify is None else verify | compared
        for number, layer in enumerate(plan.full_layers):
            own = None if plan.full_rows is None else plan.full_rows[number]
            if rows is not None:
                own = rows if own is None else rows & own
            before = layers.get(layer, torch.zeros_like(busy))
            layers[layer] = None if own is None or before is None else before | own
    full_rows = None
    if any(rows is not None for rows in layers.values()):
        full_rows = torch.stack([torch.ones_like(busy) if r is None else r for _, r in sorted(layers.items())])
    verify = None if verify is None else verify & busy[:, None]
    plan = plan_rows(state, query & busy[:, None], shown, verify, tuple(sorted(layers)))
    return plan if plan.full else replace(plan, full_rows=full_rows)


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
    whole = ((query == state.batch.valid).all(1) | ~state.unfinished).all()
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
