"""One full and one cached pass against the roofline: what the matmul peak and the memory bandwidth allow."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from unidiff.decoding.cache.bounds import Schedule
from unidiff.decoding.stats import RowWork
from unidiff.evaluation.benchmark.rates import seconds_of
from unidiff.models.partial import CachePlan
from unidiff.models.transformer import MaskedTransformer
from unidiff.tokens import TokenBatch


@dataclass(frozen=True)
class StepTime:
    """A pass without the head.

    Attributes:
        seconds: median. roofline: FLOPs over the matmul peak, or bytes of weights and stored keys and values over the
            bandwidth, whichever is longer. share: roofline / seconds.
    """

    seconds: float
    roofline: float
    share: float


@torch.no_grad()
def copy_bandwidth(size: int, device: torch.device, repeats: int = 5) -> float:
    """Bytes per second that a copy of `size` bytes moves, reading and writing counted."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / seconds_of(lambda: target.copy_(source), device, repeats)


@torch.no_grad()
def measure_steps(
    model: MaskedTransformer, batch: TokenBatch, schedule: Schedule, peak: float, bandwidth: float, repeats: int = 5
) -> dict[str, Any]:
    """A full pass, and one that recomputes the first block, of all rows.

    Args:
        batch: the rows that `schedule` describes.
        peak: FLOP/s. bandwidth: bytes per second.
    Returns:
        `full` and `cached`, each the fields of `StepTime`.
    """
    start, size, _ = schedule.blocks[0]
    query = torch.zeros_like(batch.given)
    query[:, start : start + size] = True
    time = torch.ones(len(batch.ids), device=batch.ids.device)
    store = model.make_store(batch)
    weights = sum(p.numel() * p.element_size() for p in model.blocks.parameters())
    held = store.key.nbytes + store.value.nbytes
    traits, rows = model.traits, len(batch.ids)
    found = {}
    for name, plan, queries in (
        ("full", CachePlan(), schedule.length),
        ("cached", CachePlan(query, query, full=False, width=size), size),
    ):
        seconds = seconds_of(partial(model.partial, batch.ids, plan, store, time), model.device, repeats)
        flops = rows * RowWork.even(len(traits.layers), queries, schedule.length).flops(traits)
        roofline = max(flops / peak, (weights + held) / bandwidth)
        found[name] = asdict(StepTime(seconds, roofline, roofline / seconds))
    return found
