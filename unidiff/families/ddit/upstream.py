"""D-DiT's own way to write words, `compat="upstream"`: for comparisons with recorded runs.

It differs from the exact reverse process of the sampler in this: the draws of "unmask?" and "which token?" are one race in
float32, which makes rare tokens rarer; the last evaluation takes the best token of what is left; a prediction is used again only
while no id of the whole batch changed; and the word behind an end counts as work.
"""

from __future__ import annotations

import time as wall
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from unidiff.decoding import SamplerOutput
from unidiff.decoding.stats import DecodeStats
from unidiff.tokens import TokenBatch

Probabilities = Callable[[Tensor], Tensor]
"""Ids `[B, L]` to p(x0 | x_t) `[B, L, V]`, 0 at [MASK], a point mass at known tokens."""
_TINY = 1e-10
LEAST_TIME = 1e-5


@dataclass
class Written:
    """What the loop did: ids int64 `[B, L]` after each step, evaluations until then, and the first and last weights."""

    states: list[Tensor] = field(default_factory=list)
    evaluations: list[int] = field(default_factory=list)
    probabilities: list[Tensor] = field(default_factory=list)  # of each evaluation, the final one last
    weights: list[Tensor] = field(default_factory=list)  # of each step
    final: Tensor = field(default_factory=lambda: torch.zeros(0))


def substituted(logits: Tensor, ids: Tensor, mask_id: int) -> Tensor:
    """p(x0 | x_t) `[B, L, V]` of logits (SUBS): never [MASK], and known tokens are what they are."""
    lowered = logits.clone()
    lowered[..., mask_id] -= 1e6
    p = lowered.softmax(-1)
    known = (ids != mask_id)[..., None]
    return torch.where(known, torch.nn.functional.one_hot(ids, logits.shape[-1]).to(p), p)


def write_words(
    predict: Probabilities,
    ids: Tensor,
    mask_id: int,
    steps: int,
    uniform: Callable[[int], Tensor],
    sampler: str = "ddpm_cache",
    least: float = LEAST_TIME,
) -> Written:
    """The reference's loop over ids int64 `[B, L]`, [MASK] where hidden.

    Args:
        steps: N, from time 1 to `least`. uniform: step to float32 `[B, L, V]` in [0, 1).
        sampler: "ddpm_cache", or "ddpm", which takes 0.999 t for the mask rate and never uses a prediction again.
    """
    times, dt = torch.linspace(1, least, steps + 1, device=ids.device), (1 - least) / steps
    share = 1.0 if sampler == "ddpm_cache" else 0.999
    out, held = Written(), None
    for step in range(steps):
        if held is None:
            held = predict(ids)
            out.probabilities.append(held)
        t, s = share * times[step], share * (times[step] - dt)
        weights = held * (t - s)
        weights[..., mask_id] = s
        drawn = (weights / (_TINY - (uniform(step) + _TINY).log())).argmax(-1)
        after = torch.where(ids == mask_id, drawn, ids)
        out.weights.append(weights)
        out.evaluations.append(len(out.probabilities))
        if sampler != "ddpm_cache" or not torch.equal(after, ids):
            held = None
        ids = after
        out.states.append(ids)
    out.probabilities.append(predict(ids))
    out.final = out.probabilities[-1].argmax(-1)
    return out


def written(
    predict: Probabilities, batch: TokenBatch, mask_id: int, size: int, steps: int, seeds: Tensor, record: bool
) -> SamplerOutput:
    """The words of a request as the reference writes them, with uniforms of each row's own seed; ids in front of any picture.

    Args:
        predict: of texts `[B, L]`. batch: whole rows. size: V.
    """
    begun, length = wall.perf_counter(), int((batch.modality[0] == 0).sum())
    hidden = batch.targets
    ids = torch.where(hidden, mask_id, batch.ids)
    rows = [torch.Generator().manual_seed(seed) for seed in seeds.tolist()]
    uniform = lambda step: torch.stack([torch.rand(length, size, generator=g) for g in rows]).to(ids.device)  # noqa: E731
    out = write_words(predict, ids[:, :length], mask_id, steps, uniform)
    whole = lambda words: torch.cat((words, ids[:, length:]), dim=1)  # noqa: E731
    final = whole(torch.where(hidden[:, :length], out.final, ids[:, :length]))
    sure = out.probabilities[-1].amax(-1)
    confidence = torch.cat((sure, torch.ones_like(ids[:, length:]).float()), dim=1).where(hidden, 1.0)
    count = len(out.probabilities)
    return SamplerOutput(
        batch.replace(ids=final),
        confidence,
        count,
        wall.perf_counter() - begun,
        [ids, *map(whole, out.states)] if record else None,
        steps,
        DecodeStats(evaluations=count, full_passes=count),
        hidden.sum(1).double() / count,
    )
