"""Plans of several guidance streams: which of them run as rows of one call, and the plan of that call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from unidiff.models.partial import CachePlan


def stacks(a: CachePlan, b: CachePlan) -> bool:
    """Whether streams with these plans run as rows of one call.

    Plans that refresh layer by layer differ in size when they differ at all; joined, each would pay for the larger.
    """
    if a.full or b.full:
        return a.full and b.full
    if a.query is b.query and a.verify is b.verify and a.full_rows is b.full_rows:
        return (a.full_layers, a.width) == (b.full_layers, b.width)
    plain = all(p.verify is None and not p.full_layers and p.query is not None for p in (a, b))
    return plain and a.width == b.width


def stacked(plans: Sequence[CachePlan]) -> CachePlan:
    """The plan of all rows, stream by stream."""
    first = plans[0]
    if first.full or len(plans) == 1:
        return first
    query = None if first.query is None else torch.cat([p.query for p in plans if p.query is not None])
    verify = None if first.verify is None else torch.cat([p.verify for p in plans if p.verify is not None])
    fresh = None
    if query is not None and any(p.fresh is not None for p in plans):
        none = torch.zeros_like(query[: len(query) // len(plans), 0])
        fresh = torch.cat([none if p.fresh is None else p.fresh for p in plans])
    full_rows = None if first.full_rows is None else first.full_rows.repeat(1, len(plans))
    return replace(first, query=query, verify=verify, fresh=fresh, full_rows=full_rows, others={})


def by_whole_rows(plan: CachePlan) -> CachePlan:
    """A plan for models that cannot go layer by layer: rows that would do so recompute everything, others their query."""
    if plan.query is None or (plan.full_layers and plan.full_rows is None):
        return CachePlan()
    deep = torch.zeros_like(plan.query[:, 0])
    if plan.verify is not None:
        deep = deep | (plan.verify & ~plan.query).any(1)
    if plan.full_rows is not None:
        deep = deep | plan.full_rows.any(0)
    return CachePlan(plan.query | deep[:, None], plan.logits, full=False, rows=plan.rows)
