"""Tokens from logits: keyed noise, filters, exact categorical draws and confidences. Tensors in, tensors out.

Draws invert the cumulative distribution in float64 with one uniform per position. (Gumbel noise in float32 lowers the
temperature silently; "unmask this position?" is decided elsewhere, with a uniform of its own.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unidiff.decoding.config import ModalityDecoding
from unidiff.diffusion.noise import keyed_uniform
from unidiff.kernels.fused_draw import COLDEST, fused_draw, usable

TOKEN, UNMASK, CHOICE, ORDER, REMASK = range(_USED := 5)  # independent uses of noise within a step
_USES = 8
_AHEAD = 1 << 14  # uniforms that are drawn at once: those of several steps of a small batch
_DOMAIN = 0x5A17  # keeps the sampler's noise apart from training's
CHUNK = 1 << 24  # float64 numbers held at once per intermediate
CPU_CHUNK = 1 << 16  # the same on a CPU: half a megabyte stays in its cache, and is never handed back to the system


class RowNoise:
    """Uniform noise that depends on (row seed, step, use, place in the row) only: not on batch size or padding.

    Args:
        seeds: int64 `[B]`, one per row.
        valid: bool `[B, L]`; a position's place is its rank among the valid ones, wherever padding lies.
    """

    def __init__(self, seeds: Tensor, valid: Tensor) -> None:
        if seeds.shape != (valid.shape[0],) or seeds.is_floating_point():
            raise ValueError(
                f"seeds have shape {tuple(seeds.shape)} and dtype {seeds.dtype}; expected int64 [{valid.shape[0]}], one per row"
            )
        self._seeds = seeds.to(valid.device, torch.long)
        self._place = (valid.long().cumsum(1) - 1).clamp_min(0)  # [B, L]
        self._steps = max(1, _AHEAD // (_USED * max(1, valid.numel())))
        self._block, self._drawn = -1, torch.empty(0)  # [steps, uses, B, L]

    def __call__(self, step: int, use: int) -> Tensor:
        """float64 `[B, L]` in (0, 1). All uses of several steps are drawn at once: many small calls cost more than one."""
        block, within = divmod(step, self._steps)
        if block != self._block:
            steps = torch.arange(block * self._steps, (block + 1) * self._steps, device=self._seeds.device)
            streams = (steps[:, None] * _USES + torch.arange(_USED, device=steps.device))[..., None]  # [steps, uses, 1]
            u = keyed_uniform(_DOMAIN, self._seeds.expand(*streams.shape[:2], -1), streams, self._place.shape[1])
            drawn = u.gather(-1, self._place.expand(u.shape))
            self._block, self._drawn = block, drawn.clamp_max(1 - 2**-53)  # 53 bits plus a half may round up to 1
        return self._drawn[within, use]


def gumbel(u: Tensor) -> Tensor:
    """Standard Gumbel noise from uniforms."""
    return -torch.log(-torch.log(u))


def inverse_cdf(probabilities: Tensor, u: Tensor) -> Tensor:
    """int64 `[...]`: the category whose stretch of the cumulative sum holds u `[...]` in (0, 1), never one of probability 0.

    Exact to the last bit of float64. `probabilities` `[..., V]` need not be normalised.
    """
    cdf = probabilities.double().cumsum(-1)
    total = cdf[..., -1]
    target = torch.minimum(u * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cdf, target[..., None], right=True)[..., 0].clamp_max(cdf.shape[-1] - 1)


def kept_tokens(sorted_probabilities: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """bool, which of the descending probabilities `[..., V]` survive: the k best, and the smallest set that reaches p."""
    keep = torch.ones_like(sorted_probabilities, dtype=torch.bool)
    if top_k is not None:
        keep[..., top_k:] = False
    if top_p not in (None, 1):  # sums that reach 1 by rounding would cut the tail
        before = sorted_probabilities.cumsum(-1) - sorted_probabilities
        keep &= before < top_p
        keep[..., 0] = True
    return keep


def draw_tokens(logits: Tensor, u: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> Tensor:
    """One token per position, int64 `[...]`, from softmax(logits / temperature) after the filters.

    `logits` `[..., V]` of -inf remove a token; `u` are float64 uniforms `[...]`. Ties at temperature 0 go to the lowest index.
    """
    if temperature == 0:
        return logits.argmax(-1)
    if top_k is None and top_p in (None, 1):
        return inverse_cdf(tempered(logits, temperature), u)
    ranked = logits.sort(dim=-1, descending=True, stable=True)  # by logits: hot probabilities may all be one number
    p = tempered(ranked.values, temperature)
    kept = p * kept_tokens(p, top_k, top_p)
    return ranked.indices.gather(-1, inverse_cdf(kept, u)[..., None])[..., 0]


def tempered(logits: Tensor, temperature: float) -> Tensor:
    """softmax(logits / temperature), float64; a law for every positive number, the smallest and the largest included.

    The largest logit is taken off first: divided by a temperature near 0 it would be infinite, and the law NaN.
    """
    logits = logits.double()
    return (logits - logits.amax(-1, keepdim=True)).div_(max(temperature, COLDEST)).softmax(-1)


def confidence_of(p: Tensor, probability: Tensor, measure: str, noise: Tensor) -> Tensor:
    """How sure the model is of each position, float64 `[...]`; larger is surer. See `ModalityDecoding.confidence`.

    `p` `[..., V]` are probabilities, `probability` `[...]` that of the chosen token, `noise` `[...]` the answer of `random`.
    """
    if measure == "probability":
        return probability
    if measure == "random":
        return noise
    if measure == "margin":
        best = p.topk(min(2, p.shape[-1]), dim=-1).values
        return best[..., 0] - (best[..., 1] if p.shape[-1] > 1 else 0.0)
    return torch.xlogy(p, p).sum(-1)


def ranking(confidence: Tensor, settings: ModalityDecoding, time: Tensor, u: Tensor) -> Tensor:
    """What positions are ranked by: confidences `[B, n]` with the choice noise at diffusion time `[B]`, from uniforms `[B, n]`."""
    if not settings.choice_temperature:
        return confidence
    base = confidence.log() if settings.confidence == "probability" else confidence
    noise = gumbel(u) if settings.choice_noise == "gumbel" else torch.special.ndtri(u)
    return base + settings.choice_temperature * time[:, None] * noise


@dataclass(frozen=True)
class PositionLogits:
    """Logits of one modality where they were asked for."""

    index: Tensor  # int64 [B, n], positions in the row
    is_real: Tensor  # bool [B, n], False on padding of the index
    values: Tensor  # float32 or float64 [streams, R, n, V] over the modality's slice, conditional stream first
    rows: Tensor | None = None  # int64 [R], whose values these are; None for all

    def select_rows(self, of_all: Tensor) -> Tensor:
        """`[B, ...]` to `[R, ...]`."""
        return of_all if self.rows is None else of_all[self.rows]


def gather_positions(targets: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The target positions `[B, L]` of each row as an index `[B, count]` in ascending order, and which entries are real."""
    index = (~targets).long().argsort(dim=1, stable=True)[:, :count]
    return index, targets.gather(1, index)


@dataclass(frozen=True)
class Choice:
    """What was drawn at n positions per row.

    Attributes:
        token: int64 `[B, n]`, index inside the modality's slice.
        probability: float64 `[B, n]`, of that token before temperature and filters.
        confidence: float64 `[B, n]`, by the chosen measure.
        is_finite: bool scalar, False where a position had NaN, +inf, or no token left.
    """

    token: Tensor
    probability: Tensor
    confidence: Tensor
    is_finite: Tensor

    def scatter_rows(self, rows: Tensor | None, size: int) -> Choice:
        """Of `rows`, int64 `[R]` or None for all, to that of all rows; zeros in the others."""
        if rows is None:
            return self
        columns = self.token, self.probability, self.confidence
        token, probability, confidence = (c.new_zeros(size, *c.shape[1:]).index_copy(0, rows, c) for c in columns)
        return Choice(token, probability, confidence, self.is_finite)


@dataclass(frozen=True)
class Blend:
    """How the logits of the guidance streams become those that tokens are drawn from.

    uncond + s (cond - uncond), written so that s = 1 returns cond bit by bit, and (s_k - 1) (cond - uncond_k) for every
    further unconditional stream, or (s_k - 1) (uncond_k-1 - uncond_k) where they are chained; -inf of cond stays.

    Attributes:
        scale: s `[B]` of the first unconditional stream. further: s_k of the others.
        banned: int64, indices of tokens that may not be drawn; None for none. chained: see `Guidance`.
    """

    scale: Tensor
    further: Sequence[float] = ()
    banned: Tensor | None = None
    chained: bool = False

    def weights(self, streams: int) -> Tensor:
        """`[S, B]`: the guided logits are this sum of those of `streams` streams."""
        extra = [self.scale - 1, *(torch.full_like(self.scale, s - 1) for s in self.further)][: streams - 1]
        if self.chained and extra:
            after = [*extra[1:], torch.zeros_like(self.scale)]
            return torch.stack([1 + extra[0], *(b - a for a, b in zip(extra, after, strict=True))])
        return torch.stack([1 + sum(extra, torch.zeros_like(self.scale)), *(-e for e in extra)])

    def __call__(self, values: Sequence[Tensor] | Tensor) -> Tensor:
        """Streams' logits `[S, B, n, V]`, conditional first, to guided ones `[B, n, V]` with -inf at banned tokens."""
        mixed = cond = values[0]
        if len(values) > 1:
            s = self.scale.to(cond.dtype)[:, None, None]
            mixed = torch.where(s == 1, cond, cond + (s - 1) * (cond - values[1]))
            for k, (other, extra) in enumerate(zip(values[2:], self.further, strict=True), 1):
                mixed = mixed + (extra - 1) * ((values[k] if self.chained else cond) - other)
            mixed = torch.where(cond == -torch.inf, cond, mixed)
        return mixed if self.banned is None else mixed.index_fill(-1, self.banned, -torch.inf)


def spread_ratio(logits: Tensor, weights: Tensor) -> Tensor:
    """`[B, n]`: standard deviation of the conditional logits over that of the mixed ones (arXiv 2305.08891, eq. 15), 1 in rows that
    mix nothing in.

    Args:
        logits: `[S, B, n, V]` over all ids, conditional first. weights: `[S, B]`, of the sum.
    """
    mixed = (logits * weights.to(logits.dtype)[..., None, None]).sum(0)
    ratio = logits[0].std(-1) / (mixed.std(-1) + 1e-6)
    return ratio.masked_fill((weights[1:] == 0).all(0)[:, None], 1.0)


def choose(
    values: Tensor, is_real: Tensor, settings: ModalityDecoding, u: Tensor, noise: Tensor, blend: Blend | None = None
) -> Choice:
    """Draw a token at every position and say how sure the model is of it.

    On CUDA one kernel does it where it is the same draw, see `unidiff.kernels.fused_draw`.

    Args:
        values: logits of all guidance streams, float `[S, B, n, V]`; without `blend` one, with -inf at forbidden tokens.
        is_real: bool `[B, n]`; the others are padding of the index.
        settings: temperature, filters and confidence measure.
        u, noise: float64 `[B, n]`, for the token and for `random` confidence.
    """
    if fuses(values, settings):
        return _fused(values, is_real, settings, u, noise, blend)
    _, rows, _, width = values.shape
    size = max(1, (CHUNK if values.is_cuda else CPU_CHUNK) // max(1, rows * width))
    plain = settings.temperature == 1 and settings.top_k is None and settings.top_p in (None, 1)
    parts, is_finite = [], torch.ones((), dtype=torch.bool, device=values.device)
    columns = values.split(size, 2), is_real.split(size, 1), u.split(size, 1), noise.split(size, 1)
    for part, real_part, u_part, noise_part in zip(*columns, strict=True):
        logits = part[0] if blend is None else blend(part)  # [B, c, V]
        wide = logits.double()
        p = wide.softmax(-1)
        if plain:
            token = inverse_cdf(p, u_part)
        else:
            token = draw_tokens(wide, u_part, settings.temperature, settings.top_k, settings.top_p)
        probability = p.gather(-1, token[..., None])[..., 0]
        parts.append((token, probability, confidence_of(p, probability, settings.confidence, noise_part)))
        is_finite = is_finite & (logits.amax(-1).isfinite() | ~real_part).all()
    token, probability, confidence = (torch.cat(columns, 1) for columns in zip(*parts, strict=True))
    return Choice(token, probability, confidence, is_finite)


def fuses(values: Tensor, settings: ModalityDecoding) -> bool:
    """Whether the kernel draws; see `unidiff.kernels.fused_draw.usable`."""
    return values.is_cuda and usable(values, settings.temperature, settings.top_k, settings.top_p)


def _fused(
    values: Tensor, is_real: Tensor, settings: ModalityDecoding, u: Tensor, noise: Tensor, blend: Blend | None
) -> Choice:
    weights = banned = None
    if blend is not None and len(values) > 1:
        weights = -blend.weights(len(values))[1:].to(values.dtype)
    if blend is not None and blend.banned is not None:
        nothing = torch.zeros(values.shape[-1], dtype=torch.bool, device=values.device)
        banned = nothing.index_fill(0, blend.banned, True)
    out = fused_draw(values, u, settings.temperature, settings.top_k, settings.confidence, weights, banned)
    confidence = noise if settings.confidence == "random" else out.confidence
    return Choice(out.token, out.probability, confidence, (out.is_finite | ~is_real).all())
