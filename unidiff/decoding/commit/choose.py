"""Commit rules: how many positions a pass fills, and which. Every rule works on whole batches, row by row inside."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from unidiff.decoding.config import ModalityDecoding
from unidiff.diffusion.schedules import get_schedule


def progress(step: Tensor, steps: Tensor) -> Tensor:
    """step / steps as float64 in [0, 1]. (int / int is float32 in torch, which turns quotas of 4 into 3.)"""
    return (step.double() / steps).clamp(max=1)


def quota(schedule: str, start: Tensor, remaining: Tensor, step: Tensor, steps: Tensor) -> Tensor:
    """How many positions a row commits in this pass, int64 `[B]`; at least one while any remain, all in the last pass.

    Where there are enough, one is left for each pass to come, so that a block of no fewer tokens than passes makes all of them.

    Args:
        schedule: of `unidiff.diffusion.schedules`, or `fixed` (LLaDA): n // steps, plus one in the first n % steps passes.
        start: positions that were masked when the block began.
        remaining: masked now; differs from the plan after remasking, and the quota catches up.
        step, steps: this pass, from 0, and passes of the block.
    """
    last = step + 1 >= steps
    if schedule == "fixed":
        taken = (step + 1) * (start // steps) + torch.minimum(step + 1, start % steps)
        keep = start - taken
    else:
        keep = (start * get_schedule(schedule).masked_share(progress(step + 1, steps)) + 1e-9).floor().long()
    keep = torch.maximum(keep, steps - step - 1)  # `root` would be done early
    count = torch.where(last, remaining, remaining - keep)
    return torch.maximum(count, (remaining > 0).long()).clamp_max(remaining)


ROUNDING = 1e-5
"""How far logits may lie apart that are equal but for rounding: the order in which float32 adds them up is not the same
in every batch."""
Slack = Callable[[Tensor], Tensor]
"""From a score to how far another may lie from it and still count as equal."""


def slack_of(measure: str) -> Slack | None:
    """What `ROUNDING` of the logits means for a confidence measure; None for noise, which has no rounding."""
    known: dict[str, Slack] = {
        "probability": lambda p: ROUNDING * torch.minimum(p, 1 - p),
        "margin": lambda m: ROUNDING * (1 - m),
        "entropy": lambda h: ROUNDING * h.abs(),
    }
    return known.get(measure)


def ranking_slack(settings: ModalityDecoding) -> Slack | None:
    """Of the scores that a quota ranks by: with choice noise they have no ties."""
    return None if settings.choice_temperature else slack_of(settings.confidence)


def take_best(score: Tensor, live: Tensor, count: Tensor, slack: Slack | None = None) -> Tensor:
    """bool `[B, n]`: the `count[b]` live positions of highest score; ties go to the earlier one.

    Args:
        slack: scores so close to the last one taken are ties as well. So positions that a model cannot tell apart (a row
            with nothing given) are taken from the left, and not by rounding, which depends on batch and padding.
    """
    score = score.clamp_min(torch.finfo(score.dtype).min)  # a live -inf must still come before the others
    ranked = torch.where(live, score, -math.inf)
    if slack is not None and ranked.shape[1]:
        last = (count - 1).clamp(0, ranked.shape[1] - 1)[:, None]
        least = ranked.sort(dim=1, descending=True).values.gather(1, last)  # [B, 1]
        ranked = torch.where((ranked - least).abs() <= slack(least), least, ranked)
    rank = ranked.argsort(dim=1, descending=True, stable=True).argsort(1)
    return live & (rank < count[:, None])


def above_threshold(confidence: Tensor, live: Tensor, threshold: float, slack: Slack | None = None) -> Tensor:
    """bool `[B, n]`: every live position with confidence >= threshold, and always the best one (Fast-dLLM, threshold).

    The best one is looked for where none reaches the threshold.
    """
    sure = live & (confidence >= threshold)
    return sure | take_best(confidence, live, (~sure.any(1)).long(), slack)


def factor_count(confidence: Tensor, live: Tensor, factor: float) -> Tensor:
    """int64 `[B]`: length of the longest prefix of the descending confidences with c_r >= 1 - factor / (r + 1), r from 1.

    At least one (Fast-dLLM, factor; the strict form: what is accepted is exactly that prefix).
    """
    ranked = torch.where(live, confidence, -math.inf).sort(dim=1, descending=True).values
    rank = torch.arange(1, ranked.shape[1] + 1, device=ranked.device)
    fits = ranked >= 1 - factor / (rank + 1)
    fits[:, 0] = True
    return torch.minimum(fits.long().cumprod(1).sum(1), live.sum(1))


def best_of_runs(confidence: Tensor, live: Tensor, index: Tensor, slack: Slack | None = None) -> Tensor:
    """bool `[B, n]`: the surest position of every run of live positions that are neighbours in the row; ties to the left.

    Args:
        confidence: `[B, n]`. live: bool `[B, n]`.
        index: int64 `[B, n]`, their positions, ascending over the live ones.
        slack: see `take_best`.
    """
    follows = live[:, 1:] & live[:, :-1] & (index[:, 1:] == index[:, :-1] + 1)
    begins = live & ~torch.nn.functional.pad(follows, (1, 0))
    run = begins.long().cumsum(1)  # [B, n], from 1; 0 before the first live entry
    score = torch.where(live, confidence.clamp_min(torch.finfo(confidence.dtype).min), -math.inf)
    top = torch.full_like(score, -math.inf).scatter_reduce(1, (run - 1).clamp_min(0), score, "amax")
    top = top.gather(1, (run - 1).clamp_min(0))
    best = live & (score >= (top if slack is None else top - slack(top)))
    place = torch.arange(score.shape[1], device=score.device).expand_as(run)
    first = torch.where(best, place, score.shape[1])
    left = torch.full_like(place, score.shape[1]).scatter_reduce(1, (run - 1).clamp_min(0), first, "amin")
    return best & (place == left.gather(1, (run - 1).clamp_min(0)))


def hierarchical(
    confidence: Tensor, live: Tensor, index: Tensor, threshold: float, low_threshold: float, slack: Slack | None = None
) -> Tensor:
    """bool `[B, n]`: what `above_threshold` takes, and the best of every run where it reaches `low_threshold` (dInfer).

    Runs are filled from their surest position outwards, like the halves of a divide and conquer: tokens that are
    committed together have masked ones, or known ones, between them.
    """
    best = best_of_runs(confidence, live, index, slack) & (confidence >= low_threshold)
    return above_threshold(confidence, live, threshold, slack) | best


def unmask_chance(schedule: str, step: Tensor, steps: Tensor, sigma: Tensor | float = 0.0) -> Tensor:
    """Chance that a masked position is revealed between t = 1 - step/steps and s = t - 1/steps, float64 `[B]`.

    (alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t); sigma = 0 is the reverse process (MDLM), sigma > 0 ReMDM. In and
    after the last step it is 1.
    """
    times = get_schedule(schedule)
    alpha_t = 1 - times.masked_share(progress(step, steps))
    alpha_s = 1 - times.masked_share(progress(step + 1, steps))
    chance = (alpha_s - (1 - sigma) * alpha_t) / (1 - alpha_t)
    return torch.where(step + 1 >= steps, 1.0, chance)


def decide_early(settings: ModalityDecoding, active: Tensor, count: Tensor, noise: Tensor) -> Tensor | None:
    """bool `[B, L]` of the positions to fill where the rule does not look at the model; None where it does.

    Such rules need logits only at these positions, and no pass at all when there are none (`ancestral` is one more;
    its coin is `unmask_chance`).

    Args:
        active: bool `[B, L]`, the positions that may be filled.
        count: int64 `[B]`, the quota.
        noise: uniforms `[B, L]`.
    """
    if settings.rule == "first_hitting":
        return take_best(noise, active, torch.ones_like(count))
    if settings.rule == "quota" and settings.confidence == "random":
        return take_best(noise, active, count)
    return None


def decide(
    settings: ModalityDecoding, confidence: Tensor, score: Tensor, live: Tensor, count: Tensor, index: Tensor
) -> Tensor:
    """bool `[B, n]` of the candidates to fill, by their confidences.

    Args:
        confidence: float64 `[B, n]`; thresholds apply to it.
        score: confidence with choice noise; the quota ranks by it.
        live: bool `[B, n]`, real candidates.
        count: int64 `[B]`, the quota.
        index: int64 `[B, n]`, their positions, ascending over the live ones.
    """
    slack = slack_of(settings.confidence)
    if settings.rule == "hierarchical":
        return hierarchical(confidence, live, index, settings.threshold, settings.low_threshold, slack)
    if settings.rule in ("threshold", "credit"):
        return above_threshold(confidence, live, settings.threshold, slack)
    if settings.rule == "factor":
        return take_best(confidence, live, factor_count(confidence, live, settings.factor), slack)
    return take_best(score, live, count, ranking_slack(settings))
