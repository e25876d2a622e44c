"""Several decodes of each row, of which the one that a ranker scores highest is kept.

A joint model is its own judge: pictures and texts that it drew are scored by its own likelihoods, with the same weights (best-of-n
by likelihood, as UniDisc does for its joint samples). A ranker is a function, so anything else can judge as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from unidiff.decoding import SamplerOutput
from unidiff.decoding.commit.base import ROUNDING
from unidiff.diffusion.likelihood import SCORE_STREAM, SCORED, fit_score, model_scorer, nelbo_of_parts
from unidiff.models.denoiser import Denoiser
from unidiff.tokens import Modality, TokenBatch, Vocabulary
from unidiff.tokens.batch import moved

Ranker = Callable[[Denoiser, Vocabulary, TokenBatch, Tensor, Tensor], Tensor]
"""(model, vocabulary, complete rows, words to compare with the picture, bool `[B, L]`, seeds, int64 `[B]`, equal for the
candidates of one row) -> scores `[B]`, of which the largest is kept."""
DRAWS = 8
"""Masks of the rankers by likelihood."""


@torch.no_grad()
def agreement(
    model: Denoiser, vocabulary: Vocabulary, batch: TokenBatch, words: Tensor, seeds: Tensor | None = None
) -> Tensor:
    """How much likelier the picture makes the words of complete rows, nats, float32 `[B]`.

    `fit_score` of the words beside the picture minus, where words were decoded, that beside a hidden picture: without
    that, short captions would win. Where all words were given, the drawn part of the picture must fit itself as well: plus
    its pseudo-log-likelihood in four interleaved parts (every other row and column), each beside the words and the other
    three. End-of-text does not count; a row without words scores -inf.

    Args:
        words: bool `[B, L]`, the words to compare with the picture.
    """
    if "eos" in vocabulary.specials:
        words = words & (batch.ids != vocabulary.specials["eos"])
    # the share that is hidden is the time, for models that look at it
    score = model_scorer(model, vocabulary, time=lambda share: share)
    parts = words.sum(1).div(4, rounding_mode="floor").clamp(2, 4)  # [B]
    total = fit_score(score, vocabulary, batch, words, parts)
    written = (batch.targets & (batch.modality == Modality.TEXT)).any(1)  # [B], rows whose words were decoded
    some, every = torch.stack([written.any(), written.all()]).tolist()  # read in one
    if some:
        unseen = batch.modality == Modality.IMAGE
        blind = batch.hide(unseen, vocabulary)
        total = total - torch.where(written, fit_score(score, vocabulary, blind, words, parts), 0)
    if not every:
        drawn = batch.targets & (batch.modality == Modality.IMAGE) & ~written[:, None]
        part = batch.positions[..., 1] % 2 * 2 + batch.positions[..., 2] % 2  # [B, L]
        for number in range(4):
            hidden = drawn & (part == number)
            x_t = batch.hide(hidden, vocabulary)
            total = total - torch.where(hidden, score(x_t, batch, hidden), 0).float().sum(1)
    return torch.where(words.any(1), total, -torch.inf)


@torch.no_grad()
def likelihood(
    of: str,
    model: Denoiser,
    vocabulary: Vocabulary,
    batch: TokenBatch,
    words: Tensor,
    seeds: Tensor,
    samples: int = DRAWS,
) -> Tensor:
    """`pipe.score` of complete rows, nats, float64 `[B]`: the mask-count bound of what `of` names, see `SCORED`.

    The candidates of a row are hidden alike, so that differences between them are sharp. A row without what is scored: -inf.

    Args:
        words: bool `[B, L]`. Of pictures what was drawn counts, and all of one that was not. seeds: of the masks.
    """
    image = batch.is_modality(Modality.IMAGE)
    drawn = image & batch.targets
    picture = torch.where(drawn.any(1, keepdim=True), drawn, image)
    score = model_scorer(model, vocabulary, time=lambda share: share)
    own = seeds, 0, samples, SCORE_STREAM, len(batch.ids), batch.ids.device
    parts = SCORED[of](words, picture)
    found = -nelbo_of_parts(score, batch, parts, vocabulary, *own).total.to(words.device)
    return torch.where(torch.stack([part.any(1) for part in parts]).all(0), found, -torch.inf)


RANKERS: Mapping[str, Ranker] = {"agreement": agreement, **{of: partial(likelihood, of) for of in SCORED}}
"""Rankers by name."""


def ranker_of(rank_by: str | Ranker) -> Ranker:
    """A ranker by its name, or a function as it is; `ValueError` for anything else."""
    if callable(rank_by):
        return rank_by
    if not isinstance(rank_by, str) or rank_by not in RANKERS:
        found = repr(rank_by)[:40] if isinstance(rank_by, str | int | None) else type(rank_by).__name__
        raise ValueError(f"rank_by is {found}; expected one of {', '.join(RANKERS)} or a function")
    return RANKERS[rank_by]


def keep_best(
    out: SamplerOutput,
    model: Denoiser,
    vocabulary: Vocabulary,
    words: Tensor,
    count: int,
    rank: Ranker = agreement,
    seeds: Tensor | None = None,
) -> tuple[SamplerOutput, Tensor]:
    """The best of every `count` neighbouring rows, and which rows these were (int64 `[B]`).

    The first wins ties, also those that rounding hides: the same tokens score the same but for that.
    """
    rows = len(words)
    own = torch.zeros(rows, dtype=torch.long) if seeds is None else seeds[::count].repeat_interleave(count)
    scores = rank(model, vocabulary, out.batch, words, moved(own, words.device))
    if not isinstance(scores, Tensor) or scores.shape != (rows,) or bool(scores.isnan().any()):
        found = str(list(scores.shape)) if isinstance(scores, Tensor) else type(scores).__name__
        raise ValueError(f"rank_by gave {found} for {rows} rows; expected a tensor [{rows}] of scores without NaN")
    scores = scores.to(words.device).unflatten(0, (-1, count))  # [B, count]
    top = scores.amax(1, keepdim=True)
    equal = scores >= top - ROUNDING * top.abs().clamp_min(1)
    best = equal.long().argmax(1) + torch.arange(len(scores), device=scores.device) * count
    trajectory: Sequence[Tensor] | None = out.trajectory
    kept = replace(
        out,
        batch=out.batch.rows(best),
        confidence=out.confidence[best],
        tokens_per_forward=out.tokens_per_forward[best],
        trajectory=None if trajectory is None else [ids[best] for ids in trajectory],
    )
    return kept, best
