"""Several decodes of each row, of which the one whose words and picture agree best is kept.

A joint model is its own judge: pictures and texts that it drew are scored by how much likelier the picture makes the
words, with the same weights (best-of-n by likelihood, as UniDisc does for its joint samples).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from unidiff.decoding import SamplerOutput
from unidiff.decoding.commit.base import ROUNDING
from unidiff.diffusion.likelihood import fit_score, model_scorer
from unidiff.models.denoiser import Denoiser
from unidiff.tokens import Modality, TokenBatch, Vocabulary


@torch.no_grad()
def agreement(model: Denoiser, vocabulary: Vocabulary, batch: TokenBatch, words: Tensor) -> Tensor:
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
    if bool(written.any()):
        unseen = batch.modality == Modality.IMAGE
        blind = batch.hide(unseen, vocabulary)
        total = total - torch.where(written, fit_score(score, vocabulary, blind, words, parts), 0)
    if not bool(written.all()):
        drawn = batch.targets & (batch.modality == Modality.IMAGE) & ~written[:, None]
        part = batch.positions[..., 1] % 2 * 2 + batch.positions[..., 2] % 2  # [B, L]
        for number in range(4):
            hidden = drawn & (part == number)
            x_t = batch.hide(hidden, vocabulary)
            total = total - torch.where(hidden, score(x_t, batch, hidden), 0).float().sum(1)
    return torch.where(words.any(1), total, -torch.inf)


def keep_best(
    out: SamplerOutput, model: Denoiser, vocabulary: Vocabulary, words: Tensor, count: int
) -> tuple[SamplerOutput, Tensor]:
    """The best of every `count` neighbouring rows, and which rows these were (int64 `[B]`).

    The first wins ties, also those that rounding hides: the same tokens score the same but for that.
    """
    scores = agreement(model, vocabulary, out.batch, words).unflatten(0, (-1, count))  # [B, count]
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
