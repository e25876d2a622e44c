"""Inputs of the fused draw, and a program that runs the kernel on them: `python fused_draw_cases.py OUT.safetensors`."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from unittest.mock import patch

import torch
from safetensors.torch import save_file
from torch import Tensor

from unidiff.decoding import draw
from unidiff.decoding.config import ModalityDecoding
from unidiff.decoding.draw import Blend
from unidiff.kernels.fused_draw import FusedDraw, fused_draw

BLOCK = 16  # several blocks, the last one partial


@dataclass(frozen=True)
class Case:
    """Logits of all streams `[S, B, n, V]` with everything that decides what is drawn from them."""

    values: Tensor
    u: Tensor
    settings: ModalityDecoding
    blend: Blend

    def to(self, device: str) -> Case:
        banned = None if self.blend.banned is None else self.blend.banned.to(device)
        blend = replace(self.blend, scale=self.blend.scale.to(device), banned=banned)
        return replace(self, values=self.values.to(device), u=self.u.to(device), blend=blend)


def _case(seed: int, streams: int = 1, width: int = 45, dtype: torch.dtype = torch.float32, **settings) -> Case:
    generator = torch.Generator().manual_seed(seed)
    values = 3 * torch.randn(streams, 2, 3, width, generator=generator, dtype=torch.float64).to(dtype)
    u = torch.rand(2, 3, generator=generator, dtype=torch.float64).clamp(1e-12, 1 - 2**-53)
    further = tuple(0.5 + k for k in range(streams - 2))
    scale = torch.tensor([1.0, 2.7], dtype=torch.float64)  # the first row is not guided
    return Case(values, u, ModalityDecoding(**settings), Blend(scale, further))


def _tied(case: Case, step: float = 0.5) -> Case:
    """Logits on a coarse grid: ties everywhere, also between blocks."""
    return replace(case, values=(case.values / step).round() * step)


def _edges(dtype: torch.dtype) -> Case:
    """Uniforms at both ends of the range, and on both sides of a token of probability 1e-12."""
    case = _case(11, width=20, dtype=dtype)
    p = torch.full((20,), 1e-30, dtype=torch.float64)
    p[3], p[18] = 1 - 1e-12, 1e-12
    u = torch.tensor([2**-54, 0.5, 1 - 2e-12, 1 - 0.9e-12, 1 - 2e-15, 1 - 2**-53], dtype=torch.float64)
    return replace(case, values=p.log().to(dtype).expand(1, 2, 3, 20), u=u.view(2, 3))


def _unsound() -> Case:
    """NaN and +inf in the first row, at single positions; nothing left in a position of the second."""
    case = _case(12)
    values = case.values.clone()
    values[0, 0, 1, 40], values[0, 0, 2, 2], values[0, 1, 2] = torch.nan, torch.inf, -torch.inf
    return replace(case, values=values)


def _banned(case: Case, *tokens: int) -> Case:
    """Tokens banned by index (a whole block among them), and some that the conditional stream excludes itself."""
    values = case.values.clone()
    values[0, :, :, 5:9] = -torch.inf
    return replace(case, values=values, blend=replace(case.blend, banned=torch.tensor(tokens)))


def cases() -> dict[str, Case]:
    whole_block = range(BLOCK, 2 * BLOCK)
    return {
        "plain": _case(0),
        "float64": _case(1, dtype=torch.float64, temperature=0.7),
        "warm": _case(2, temperature=2.5),
        "cold": _case(3, temperature=0.05, confidence="margin"),
        "greedy": _tied(_case(4, temperature=0.0, top_k=3, top_p=0.5), step=2.0),
        "guided": _case(5, streams=2, confidence="margin"),
        "guided three ways": _case(6, streams=4, temperature=0.8, confidence="entropy"),
        "banned": _banned(_case(7, streams=2, confidence="entropy"), 0, 44, *whole_block),
        "banned, top-k": _banned(_case(8, top_k=40), 1, *whole_block),
        "top-k with ties": _tied(_case(9, streams=2, top_k=5, temperature=1.3)),
        "top-1": _case(10, top_k=1, temperature=5.0),
        "top-k above V": _case(13, width=7, top_k=50, confidence="random"),
        "one token": _case(14, width=1, confidence="margin"),
        "rare": _edges(torch.float64),
        "rare, float32": _edges(torch.float32),
        "tied margin": _tied(_case(15, confidence="margin"), step=2.0),
        "unsound": _unsound(),
        "coldest": _tied(_case(16, temperature=5e-324)),
        "coldest, top-k, guided": _case(17, streams=2, temperature=1e-308, top_k=4),
        "coldest, banned": _banned(_case(18, streams=2, temperature=2e-308, confidence="entropy"), 0, *whole_block),
        "hottest": _case(19, temperature=1.7e308),
        "hottest, top-k": _case(20, temperature=1e308, top_k=5),
        "cold float64": _case(21, dtype=torch.float64, temperature=1e-300, top_p=1.0),
    }


def run_kernel(case: Case) -> FusedDraw:
    """`choose` as it runs on CUDA, with small blocks; needs Triton's interpreter."""
    seen = []

    def in_small_blocks(*arguments) -> FusedDraw:
        seen.append(fused_draw(*arguments, block=BLOCK))
        return seen[-1]

    is_real = torch.ones_like(case.u, dtype=torch.bool)
    with patch.object(draw, "fuses", return_value=True), patch.object(draw, "fused_draw", in_small_blocks):
        choice = draw.choose(case.values, is_real, case.settings, case.u, case.u, case.blend)
    (kernel,) = seen
    assert choice.is_finite.item() == kernel.is_finite.all().item()
    return FusedDraw(choice.token, choice.probability, choice.confidence, kernel.is_finite)


if __name__ == "__main__":
    found = {}
    for name, case in cases().items():
        out = run_kernel(case)
        found |= {f"{name}/{key}": value.contiguous() for key, value in out._asdict().items()}
    save_file(found, sys.argv[1])
