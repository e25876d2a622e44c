"""Reference variants of the objective, kept for comparison with published systems; none is used by default.

The D3PM and SEDD losses of MDLM's code base, T-step times, UniDisc's modality dropout and its capped weighting.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from unidiff.diffusion.objective import ElboTerms
from unidiff.tokens import Modality, TokenBatch

SMALLEST_BLOCK = 4  # runs of this many tokens or fewer are never dropped by UniDisc


def discrete_time(t: Tensor, steps: int) -> Tensor:
    """Round t up to the grid of T steps, floor(t T)/T + 1/T; times lie in [1/T, 1]."""
    return torch.floor(t * steps) / steps + 1 / steps


def d3pm_loss(log_x0: Tensor, log_mask: Tensor, alpha_t: Tensor, alpha_s: Tensor, steps: int) -> Tensor:
    """T KL(q(x_s | x_t, x0) || p(x_s | x_t)) at a masked position, for a network that may put mass on [MASK].

    With D = alpha_t p(m) + 1 - alpha_t: p(x_s = x0) = (alpha_s - alpha_t) p(x0) / D and
    p(x_s = m) = (alpha_s p(m) + 1 - alpha_s) / D (D3PM, arXiv 2107.03006, eq. 4 for absorbing noise). With p(m) = 0 it
    is T (alpha_s - alpha_t)/(1 - alpha_t) times -log p(x0), the T-step NELBO. Where alpha_s = 1 (the first step) the
    [MASK] term is taken at its limit, 0; MDLM's code returns NaN there.

    Args:
        log_x0, log_mask: log p of the clean token and of [MASK], `[...]`.
        alpha_t, alpha_s: broadcastable, alpha_s = alpha(t - 1/T).

    Returns:
        `[...]`; the caller zeroes visible positions.
    """
    unmask = (alpha_s - alpha_t) / (1 - alpha_t)
    mask = log_mask.exp()
    denominator = torch.log1p(alpha_t * mask / (1 - alpha_t))
    first = unmask * (denominator - log_x0)
    noise_s = (1 - alpha_s).clamp_min(0)
    stay = torch.log1p(alpha_s * mask / torch.where(noise_s > 0, noise_s, 1))
    return steps * (first + (1 - unmask) * (denominator - stay))  # 1 - unmask is 0 where noise_s is


def sedd_log_score(logits: Tensor, x_t: Tensor, sigma: Tensor) -> Tensor:
    """SEDD's parameterisation of the concrete score: logits - log expm1(sigma) - log(V - 1), 0 at the current token.

    Args:
        logits: `[B, L, V]`.
        x_t: int64 `[B, L]`.
        sigma: total noise `[B]`, positive.
    """
    scale = torch.log(torch.expm1(sigma)) + torch.log(logits.new_tensor(logits.shape[-1] - 1))
    score = logits - scale[:, None, None]
    return score.scatter(-1, x_t[..., None], 0.0)


def sedd_loss(log_score: Tensor, x0: Tensor, masked: Tensor, mask_id: int, sigma: Tensor) -> Tensor:
    """Denoising score entropy per token (SEDD, arXiv 2310.16834, eq. 9) for absorbing noise; multiply by d sigma/dt.

    For a masked position with ratio r = p(x0 | ...)/p(m) = 1/expm1(sigma): sum over tokens of the score, minus
    r log score(x0), plus r (log r - 1). 0 at visible positions.

    Args:
        log_score: `[B, L, V]`.
        x0: int64 `[B, L]`.
        masked: bool `[B, L]`.
        sigma: `[B]`.
    """
    ratio = (1 / torch.expm1(sigma))[:, None]  # [B, 1]
    scores = log_score.exp().sum(-1) - log_score[..., mask_id].exp()
    negative = ratio * log_score.gather(-1, x0[..., None])[..., 0]
    entropy = scores - negative + ratio * (ratio.log() - 1)
    return torch.where(masked, entropy, 0)


@dataclass(frozen=True)
class ModalityDropout:
    """UniDisc's guidance dropout for one batch.

    Attributes:
        masked: bool `[B, L]`, what is hidden after dropping.
        text, image: bool `[B]`, rows whose text (image) was dropped.
    """

    masked: Tensor
    text: Tensor
    image: Tensor


def unidisc_dropout(
    masked: Tensor, modality: Tensor, probability: float, u_text: Tensor, u_image: Tensor
) -> ModalityDropout:
    """Hide one modality of a row entirely and show the other entirely, each with probability p/2, never both.

    Unlike the default condition dropout, the target's own noise is lost: a text-dropped row is captioning at t = 1.

    Args:
        masked: bool `[B, L]` from the forward process.
        modality: int64 `[B, L]`.
        u_text, u_image: uniforms `[B]`.
    """
    text, image = u_text < probability / 2, u_image < probability / 2
    text, image = text & ~image, image & ~text
    is_text = modality == Modality.TEXT
    dropped = torch.where(text[:, None], is_text, ~is_text)
    return ModalityDropout(torch.where((text | image)[:, None], dropped, masked), text, image)


@dataclass(frozen=True)
class BlockDropout:
    """UniDisc's guidance dropout of packed rows.

    Attributes:
        masked: bool `[B, L]`, what is hidden after dropping. rows: bool `[B]`, rows with a dropped block.
    """

    masked: Tensor
    rows: Tensor


def unidisc_block_dropout(masked: Tensor, batch: TokenBatch, probability: float, u: Tensor) -> BlockDropout:
    """Hide whole blocks: the k-th (from 0) of the n blocks of a sample with probability 2 p (k + 1) / n.

    A block is a run of more than 4 tokens of one modality in one sample. Its other tokens keep their own masks.

    Args:
        masked: bool `[B, L]` from the forward process.
        batch: packed rows.
        probability: p, upstream `mask_entire_modality`.
        u: uniforms, one per block at least, in row-major order.

    Raises:
        ValueError: fewer uniforms than blocks.
    """
    masked, rows, used = masked.clone(), torch.zeros_like(masked[:, 0]), 0
    for row in range(len(masked)):
        key = torch.where(batch.valid[row], batch.sample_ids[row] * len(Modality) + batch.modality[row], -1)
        values, lengths = key.unique_consecutive(return_counts=True)
        ends = lengths.cumsum(0)
        blocks: dict[int, list[tuple[int, int]]] = {}
        for value, length, end in zip(values.tolist(), lengths.tolist(), ends.tolist(), strict=True):
            if value >= 0 and length > SMALLEST_BLOCK:
                blocks.setdefault(value // len(Modality), []).append((end - length, end))
        for own in blocks.values():
            if used + len(own) > len(u):
                raise ValueError(f"got {len(u)} uniforms for more blocks; give one per block of more than 4 tokens")
            for k, (start, stop) in enumerate(own):
                if float(u[used + k]) < 2 * probability * (k + 1) / len(own):
                    masked[row, start:stop], rows[row] = True, True
            used += len(own)
    return BlockDropout(masked, rows)


def unidisc_capped_total(terms: ElboTerms, modality_weights: Mapping[Modality, float]) -> Tensor:
    """UniDisc's total with its text term rescaled to be at most the (detached) image term.

    Both terms are modality-weighted sums over *all* target positions' count, so that `joint_elbo(...).total` with the
    same weights is the uncapped version. A batch without image loss is not capped: its text would learn nothing.
    """
    count = (terms.count_text + terms.count_image).sum().clamp_min(1)
    text = modality_weights[Modality.TEXT] * terms.row_text.sum() / count
    image = modality_weights[Modality.IMAGE] * terms.row_image.sum() / count
    cap = torch.minimum(text.detach(), image.detach()) / text.detach().clamp_min(torch.finfo(text.dtype).tiny)
    return text * torch.where(image.detach() > 0, cap, 1) + image


def plain_cross_entropy(logits: Tensor, labels: Tensor, ignore: int = -100) -> Tensor:
    """MMaDA's text-to-image loss: the mean cross-entropy over labels, visible ones included, without a time weight."""
    return F.cross_entropy(logits.flatten(0, -2).float(), labels.flatten(), ignore_index=ignore)
