"""Single reverse steps of the reference systems (MDLM, UniDisc), with their uniforms passed in.

For comparisons with recorded runs. Where the sampler does the same thing its own function is used here too; what
differs is kept apart: the exponential race in float32 instead of the inverse CDF, quotas that round, a nucleus that
drops the token which crosses p, and MDLM's analytic update, which may change known tokens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from unidiff.decoding.commit.base import take_best
from unidiff.tokens import Modality, Vocabulary

TINY = 1e-10  # the reference's guard against log(0)


def clean_probabilities(
    logits: Tensor, ids: Tensor, modality: Tensor, vocabulary: Vocabulary, carry_over: bool = True
) -> Tensor:
    """p(x0 | x_t) over the whole vocabulary (SUBS): 0 at [MASK] and at the other modality's ids.

    Args:
        logits: `[B, L, V]`. ids, modality: int64 `[B, L]`.
        carry_over: a known token is a point mass on itself (MDLM; UniDisc without guidance).
    """
    start, stop = (
        torch.tensor([vocabulary.range_of(m)[end] for m in Modality], device=ids.device)[modality][..., None]
        for end in (0, 1)
    )
    token = torch.arange(vocabulary.size, device=ids.device)
    hidden = sorted({vocabulary.mask_id, vocabulary.image_mask})
    allowed = (token >= start) & (token < stop)  # [B, L, V]
    allowed[..., hidden] = False
    p = torch.where(allowed, logits, -torch.inf).softmax(-1)
    if not carry_over:
        return p
    known = ~torch.isin(ids, torch.tensor(hidden, device=ids.device))[..., None]
    return torch.where(known, torch.nn.functional.one_hot(ids, vocabulary.size).to(p.dtype), p)


def reverse_weights(p_x0: Tensor, rate_t: Tensor | float, rate_s: Tensor | float, mask_id: int) -> Tensor:
    """Unnormalised q(x_s | x_t) of a masked token: p_x0 (rate_t - rate_s), and rate_s at [MASK]. `[B, L, V]`.

    `rate` is the mask rate 1 - alpha; dividing by rate_t gives the posterior. (`ddpm_cache` of both systems takes t
    itself for the rate, `ddpm` the schedule's.)
    """
    weights = p_x0 * (rate_t - rate_s)
    weights[..., mask_id] = rate_s
    return weights


def race(weights: Tensor, u: Tensor) -> Tensor:
    """Categorical draw as an exponential race: argmax of weights / (1e-10 - log(u + 1e-10)). int64 `[...]`."""
    return (weights / (TINY - (u + TINY).log())).argmax(-1)


def reverse_step(ids: Tensor, weights: Tensor, u: Tensor, mask_id: int) -> Tensor:
    """x_s from x_t: masked positions are drawn from `weights`, known ones stay."""
    return torch.where(ids == mask_id, race(weights, u), ids)


def subs_score(p_x0: Tensor, ids: Tensor, sigma: Tensor | float, mask_id: int) -> Tensor:
    """Concrete score p_t(y) / p_t(x) `[B, L, V]` of a SUBS model at total noise sigma (MDLM, appendix on SEDD).

    Masked x: p_x0(y) / expm1(sigma) for a token y, 1 for [MASK]. Known x: 1 at itself, expm1(sigma) for [MASK], else 0.
    """
    odds = torch.expm1(torch.as_tensor(sigma, dtype=p_x0.dtype, device=p_x0.device))
    masked = p_x0 / odds
    masked[..., mask_id] = 1
    known = torch.nn.functional.one_hot(ids, p_x0.shape[-1]).to(p_x0.dtype)
    known[..., mask_id] = odds.expand(ids.shape)
    return torch.where((ids == mask_id)[..., None], masked, known)


def analytic_weights(score: Tensor, ids: Tensor, dsigma: Tensor | float, mask_id: int, denoise: bool = False) -> Tensor:
    """Weights of MDLM's analytic (Tweedie) update over a noise difference dsigma, at every position. `[B, L, V]`.

    The score is moved back by e^dsigma, its missing mass (1 - e^dsigma) sum(score) goes to [MASK], and the result is
    multiplied by the chance of coming from y to x. `denoise` removes [MASK]: the last step.
    """
    growth = torch.as_tensor(dsigma, dtype=score.dtype, device=score.device).exp()
    missing = (1 - growth) * score.sum(-1)
    moved = score * growth
    moved[..., mask_id] += missing
    came = torch.nn.functional.one_hot(ids, score.shape[-1]).to(score.dtype) / growth
    came = came + torch.where(ids == mask_id, 1 - 1 / growth, 0.0)[..., None]
    weights = moved * came
    if denoise:
        weights[..., mask_id] = 0
    return weights


def rounded_quotas(mode: str, masked: int, steps: int) -> Tensor:
    """UniDisc's tokens per step, int32 `[steps]`: shares rounded to even in float32, zeros made 1, the last one balances.

    With fewer tokens than steps the sum exceeds `masked`; the reference relies on the selection to run out.
    """
    r = torch.linspace(1, 0, steps)
    share = {
        "root": lambda: 1 - r.sqrt(),
        "linear": lambda: 1 - r,
        "square": lambda: 1 - r.square(),
        "cosine": lambda: torch.cos(r * math.pi * 0.5),
        "arccos": lambda: torch.arccos(r) / (math.pi * 0.5),
    }
    if mode not in share:
        raise ValueError(f"quota mode {mode!r} is unknown; expected one of {', '.join(share)}")
    values = share[mode]()
    counts = (values / values.sum() * masked).round()
    counts[counts == 0] = 1
    counts[-1] = (counts[-1] + masked - counts.sum()).clamp_min(0)
    return counts.int()


def maskgit_step(
    ids: Tensor, p_x0: Tensor, tokens: Tensor, gumbel: Tensor, noise_scale: float, counts: Tensor, mask_id: int
) -> Tensor:
    """UniDisc's MaskGIT step: the `counts[b]` masked positions of highest log p_x0(token) + noise take their tokens.

    Args:
        ids, tokens: int64 `[B, L]`, the state and the drawn tokens. p_x0: `[B, L, V]`. gumbel: `[B, L]`.
        noise_scale: upstream 4.5 t.
        counts: int64 `[B]`.
    """
    score = p_x0.gather(-1, tokens[..., None])[..., 0].log() + noise_scale * gumbel
    return torch.where(take_best(score, ids == mask_id, counts), tokens, ids)


def short_nucleus(probabilities: Tensor, top_p: float, temperature: float) -> Tensor:
    """UniDisc's nucleus: descending probabilities `[..., V]`, renormalised, without the token at which the sum crosses p.

    The temperature divides probabilities, which changes nothing after normalisation unless p is compared with the
    divided sum, as here. The best token always stays.
    """
    ranked = (probabilities / temperature).sort(dim=-1, descending=True).values
    keep = ranked.cumsum(-1) <= top_p
    keep[..., 0] = True
    kept = ranked * keep
    return kept / kept.sum(-1, keepdim=True)
