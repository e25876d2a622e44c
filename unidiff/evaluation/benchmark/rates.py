"""How fast matrix products are here: the peak, and the rate of a model's own products at different numbers of rows."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from unidiff.models.transformer import MaskedTransformer


@dataclass(frozen=True)
class MatmulRates:
    """FLOP/s at some numbers of rows; in between by the logarithm of the number, outside as at the nearest.

    Args:
        points: (rows, FLOP/s), ascending.
    """

    points: tuple[tuple[int, float], ...]

    def __call__(self, rows: int) -> float:
        """FLOP/s at `rows` rows."""
        below = [p for p in self.points if p[0] <= rows]
        above = [p for p in self.points if p[0] >= rows]
        if not below or not above:
            return (below or above[::-1])[-1][1]
        (low, slow), (high, fast) = below[-1], above[0]
        if low == high:
            return slow
        return slow + (fast - slow) * math.log(rows / low) / math.log(high / low)


def row_counts(length: int, block: int) -> list[int]:
    """Where to measure: powers of 4 up to the row, the block and the whole row."""
    powers = [4**i for i in range(1 + int(math.log(length, 4)))]
    return sorted({n for n in (*powers, block, length) if n <= length})


@torch.no_grad()
def measure_rates(model: MaskedTransformer, rows: Sequence[int], repeats: int = 5) -> MatmulRates:
    """Rates of the linear layers of all blocks, one after the other as in a pass, with their own weights.

    Args:
        rows: numbers of rows, ascending.
        repeats: the median of so many timings, after one that does not count.
    """
    blocks: list[Any] = list(model.blocks)
    weights: list[Tensor] = []
    for block in blocks:
        weights += [block.attention.qkv.weight, block.attention.out.weight]
        weights += [block.feed_forward.up.weight, block.feed_forward.down.weight]
    size = sum(w.numel() for w in weights)
    points = []
    for n in rows:
        inputs = {w.shape[1]: torch.randn(n, w.shape[1], dtype=w.dtype, device=w.device) for w in weights}
        work = partial(_products, weights, inputs)
        points.append((n, 2 * n * size / seconds_of(work, model.device, repeats)))
    return MatmulRates(tuple(points))


@torch.no_grad()
def matmul_peak(size: int, dtype: torch.dtype, device: torch.device, repeats: int = 5) -> float:
    """FLOP/s of a product of two `size x size` matrices."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / seconds_of(lambda: a @ b, device, repeats)


def seconds_of(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median time of a call, after one that does not count."""
    times = []
    for _ in range(repeats + 1):
        begun = time.perf_counter()
        work()
        synchronise(device)
        times.append(time.perf_counter() - begun)
    return median(times[1:])


def _products(weights: Sequence[Tensor], inputs: Mapping[int, Tensor]) -> None:
    for w in weights:
        F.linear(inputs[w.shape[1]], w)


def synchronise(device: torch.device) -> None:
    """Wait until a device has finished; the CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
