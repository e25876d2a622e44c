"""How well finished tokens fit each other, so that the best of several decodes can be kept."""

from __future__ import annotations

import torch
from torch import Tensor

from unidiff.diffusion.likelihood import Scorer
from unidiff.tokens import TokenBatch, Vocabulary


@torch.no_grad()
def fit_score(
    score: Scorer, vocabulary: Vocabulary, batch: TokenBatch, targets: Tensor, parts: int | Tensor = 2
) -> Tensor:
    """Conditional pseudo-log-likelihood of the target tokens given all others, nats, float32 `[B]`.

    The mean over two kinds of hiding: all target tokens at once, and each of `parts` interleaved parts with the others
    known (in the spirit of Salazar et al. 2020, arXiv 1910.14659, at a fixed price of `parts + 1` forward passes). What
    is hidden depends on places only, so that rows of one request compare fairly: the same words score higher beside the
    picture that shows them.

    Args:
        score: for instance `unidiff.diffusion.likelihood.model_scorer(model, vocabulary)`.
        batch: complete rows `[B, L]`.
        targets: bool `[B, L]`; a row without any scores 0.
        parts: of all rows, or int64 `[B]`.

    Raises:
        ValueError: fewer than 2 parts.
    """
    number_of = torch.as_tensor(parts, device=batch.ids.device).expand(len(batch.ids))
    least, most = number_of.aminmax()
    if least < 2:
        raise ValueError(f"parts is {int(least)}; expected at least 2")
    part = (targets.long().cumsum(1) - 1) % number_of[:, None]  # [B, L]
    masks, total = batch.mask_ids(vocabulary), torch.zeros(len(batch.ids), device=batch.ids.device)
    for hidden in (targets, *(targets & (part == number) for number in range(int(most)))):
        x_t = batch.replace(ids=torch.where(hidden, masks, batch.ids))
        total -= 0.5 * torch.where(hidden, score(x_t, batch, hidden), 0).float().sum(1)
    return total
