"""Estimators of the NELBO that only tests use: random times, leave-one-out, block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from unidiff.diffusion.likelihood import Nelbo, Scorer, average_nelbo, mask_count_nelbo
from unidiff.diffusion.noise import NoisyBatch, keyed_uniform, mask_count, mask_tokens
from unidiff.diffusion.schedules import Schedule
from unidiff.tokens import Modality, TokenBatch, Vocabulary


def log_prob_scorer(log_probs: Callable[[TokenBatch], Tensor]) -> Scorer:
    """Score with a function that returns `[B, L, V]` log-probabilities: tables and small models."""

    def score(x_t: TokenBatch, x0: TokenBatch, where: Tensor) -> Tensor:
        chosen = log_probs(x_t).gather(-1, x0.ids[..., None])[..., 0]
        return torch.where(where, -chosen, 0)

    return score


def time_nelbo(
    score: Scorer,
    batch: TokenBatch,
    vocabulary: Vocabulary,
    schedule: Schedule,
    keys: Tensor,
    seed: int = 0,
    samples: int = 8,
    low: float = 0.0,
) -> Nelbo:
    """The training form: t uniform on (low, 1), shared by a row's tokens, weight -alpha'/(1 - alpha).

    With `low` > 0, or a schedule that does not run from alpha = 1 to 0, the estimate is biased.
    """

    def draws() -> Iterator[tuple[NoisyBatch, Tensor]]:
        for j in range(samples):
            u = keyed_uniform(seed, keys, j, batch.shape[1] + 1)
            t = low + (1 - low) * u[:, 0]
            yield mask_tokens(batch, schedule.mask_rate(t), vocabulary, u[:, 1:]), schedule.weight(t)

    return average_nelbo(score, batch, draws())


def leave_one_out_nelbo(
    score: Scorer,
    batch: TokenBatch,
    vocabulary: Vocabulary,
    schedule: Schedule,
    keys: Tensor,
    seed: int = 0,
    samples: int = 8,
) -> Nelbo:
    """The other common form: weight -alpha'/alpha over *visible* positions, each scored with itself hidden again.

    One visible target is chosen per draw and counted for all of them. Read literally, with visible tokens scored as
    they stand, the sum is 0; this reading equals the NELBO. For tests: its variance is large.
    """

    def draws() -> Iterator[tuple[NoisyBatch, Tensor]]:
        for j in range(samples):
            u = keyed_uniform(seed, keys, j, 2 * batch.shape[1] + 1)
            t, u_mask, u_choice = u[:, 0], u[:, 1 : batch.shape[1] + 1], u[:, batch.shape[1] + 1 :]
            noisy = mask_tokens(batch, schedule.mask_rate(t), vocabulary, u_mask)
            visible = batch.targets & ~noisy.masked
            chosen = mask_count(batch.replace(given=~visible), torch.ones_like(keys), vocabulary, u_choice).masked
            x_t = noisy.batch.hide(chosen, vocabulary)
            yield NoisyBatch(x_t, chosen), schedule.dsigma(t) * visible.sum(1)

    return average_nelbo(score, batch, draws())


def block_batches(batch: TokenBatch, blocks: Tensor, vocabulary: Vocabulary) -> list[TokenBatch]:
    """One batch per block: earlier blocks given, the block's own targets to be scored, later targets hidden.

    Hidden later targets stay visible to attention as [MASK]; a block-causal model does not look at them.

    Args:
        blocks: int64 `[L]` or `[B, L]`, block number of each position, from 0 in generation order.
    """
    blocks = blocks.expand(batch.shape)
    out = []
    for block in range(int(blocks[batch.targets].max()) + 1):
        later = batch.targets & (blocks > block)
        hidden = batch.hide(later, vocabulary)
        out.append(hidden.replace(given=batch.given | (blocks != block)))
    return out


def block_nelbo(
    score: Scorer,
    batch: TokenBatch,
    blocks: Tensor,
    vocabulary: Vocabulary,
    keys: Tensor,
    seed: int = 0,
    samples: int = 8,
) -> Nelbo:
    """Block-diffusion NELBO (BD3-LM, arXiv 2503.09573): the sum over blocks of the NELBO given the clean prefix.

    Block size 1 is the autoregressive NLL, one block the plain NELBO. Report it under its own name.
    """
    parts = [
        mask_count_nelbo(score, part, vocabulary, keys, seed, samples, stream=1 + number)
        for number, part in enumerate(block_batches(batch, blocks, vocabulary))
    ]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def condition_on(batch: TokenBatch, modality: Modality, rows: Tensor | None = None) -> TokenBatch:
    """Declare every token of `modality` given (in `rows`, bool `[B]`, or all): the NELBO of the rest given it."""
    known = batch.modality == modality
    return batch.replace(given=batch.given | (known if rows is None else known & rows[:, None]))
