"""Guidance, temperature, top-k, exact categorical draw and confidence in one pass over the logits.

The plain torch twin is `unidiff.decoding.draw` itself (`Blend`, then the torch path of `choose`): tests compare the two.
"""

from __future__ import annotations

import shutil
import sys
from functools import cache
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

COLDEST = sys.float_info.min
"""Temperatures below draw the same, but processors that flush subnormal numbers would divide by 0."""
_MEASURES = {"probability": 0, "random": 0, "margin": 1, "entropy": 2}
_BLOCK = 1024  # columns read at a time
_LARGEST_K = 128  # the ranked list of a position lives in registers
_DTYPES = (torch.float32, torch.float64)


class FusedDraw(NamedTuple):
    """What was drawn, per position `[B, n]`."""

    token: Tensor  # int64
    probability: Tensor  # float64, of that token before temperature and filters
    confidence: Tensor  # float64, by the chosen measure
    is_finite: Tensor  # bool, False where a position had NaN, +inf, or no token left


@cache
def _installed() -> bool:
    """Whether triton is there with a C compiler, which it needs for its launchers."""
    return find_spec("triton") is not None and any(shutil.which(name) for name in ("cc", "gcc", "clang"))


def fusible(dtype: torch.dtype, temperature: float, top_k: int | None, top_p: float | None) -> bool:
    """Whether the kernel draws the same tokens as the torch path under these settings.

    Top-p is not fused: which tokens it keeps depends on float64 sums in ranked order over the whole vocabulary, and no
    bounded list holds them. Top-k is fused up to 128 tokens of float32 logits. Filters do not matter at temperature 0.
    """
    if dtype not in _DTYPES:
        return False
    if temperature == 0:
        return True
    return top_p in (None, 1) and (top_k is None or (top_k <= _LARGEST_K and dtype == torch.float32))


def usable(values: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> bool:
    """Whether `fused_draw` should replace the torch path: on CUDA, where triton is installed, if it is `fusible`."""
    return values.is_cuda and values.numel() > 0 and fusible(values.dtype, temperature, top_k, top_p) and _installed()


def fused_draw(
    values: Tensor,
    u: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    confidence: str = "probability",
    weights: Tensor | None = None,
    banned: Tensor | None = None,
    block: int = _BLOCK,
) -> FusedDraw:
    """Draw one token per position from softmax(mixed logits / temperature), by inverting the CDF in float64.

    Mixed logits are cond + sum_k w_k (cond - stream_k), rounded as `draw.Blend` rounds them. Each block of columns
    leaves its maximum and sums; these pick the block that holds the token, and only that block is read again. Sums run
    in another order than in the torch path: the token differs from its only where u lies within rounding (about 1e-15)
    of the border between two tokens.

    Args:
        values: float32 or float64 `[S, B, n, V]` on CUDA (on the CPU under Triton's interpreter), conditional first.
        u: float64 `[B, n]` in (0, 1).
        temperature: 0 takes the largest logit, the lowest index among ties.
        top_k: at most 128, for float32 only; the ranked order of the torch path is kept.
        confidence: `probability`, `margin`, `entropy`, or `random` (then the caller's noise, not what is returned).
        weights: `[S - 1, B]`, scale - 1 of each further stream; 0 in the first leaves a row unguided.
        banned: bool `[V]`, tokens never drawn.
        block: columns read at a time, a power of two.

    Raises:
        ValueError: settings that the kernel does not fuse, or streams without weights.
        ImportError: triton is not installed.
    """
    streams, rows, positions, width = values.shape
    if not fusible(values.dtype, temperature, top_k, None):
        raise ValueError(
            f"cannot fuse top_k {top_k} over {values.dtype} logits; use float32 and at most {_LARGEST_K}, or draw.choose"
        )
    if streams > 1 and (weights is None or weights.shape != (streams - 1, rows)):
        given = None if weights is None else tuple(weights.shape)
        raise ValueError(f"weights have shape {given}; expected {(streams - 1, rows)}, one per further stream and row")
    from triton import next_power_of_2

    from unidiff.kernels.draw_kernel import draw_kernel

    greedy = temperature == 0
    top = 0 if greedy or top_k is None else max(2, next_power_of_2(top_k))
    block = max(block, top)
    blocks = -(-width // block)
    values, device = values.contiguous(), values.device
    token = torch.empty(rows, positions, dtype=torch.long, device=device)
    probability, sureness = (torch.empty(rows, positions, dtype=torch.float64, device=device) for _ in range(2))
    is_finite = torch.empty(rows, positions, dtype=torch.bool, device=device)
    # made on the device: no host copy
    heat = torch.full((1,), max(temperature, COLDEST), dtype=torch.float64, device=device)
    with torch.cuda.device_of(values):
        draw_kernel[(rows * positions,)](
            values,
            values if weights is None else weights.to(values.dtype).contiguous(),
            values if banned is None else banned.to(torch.uint8).contiguous(),
            u.double().contiguous(),
            heat,
            token,
            probability,
            sureness,
            is_finite,
            rows,
            positions,
            width,
            0 if top_k is None else top_k,
            STREAMS=streams,
            BAN=banned is not None,
            GREEDY=greedy,
            TEMPERED=temperature not in (0, 1),
            MEASURE=_MEASURES[confidence],
            TOP=top,
            BLOCK=block,
            BLOCKS=blocks,
            SLOTS=max(2, next_power_of_2(blocks)),
            enable_fp_fusion=False,  # torch rounds the product before it adds
        )
    return FusedDraw(token, probability, sureness, is_finite)
