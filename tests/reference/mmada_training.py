"""MMaDA's noising and losses (Yang et al. 2025, arXiv 2505.15809, section 3.1).

The uniforms come in, so that recorded runs can be repeated. These are the family's own objectives, for fine-tuning its
checkpoints as it did; unidiff's joint ELBO is in `unidiff.diffusion.objective`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from reference.mmada_prompts import IGNORED


@dataclass(frozen=True)
class NoisyCodes:
    """Image ids with some masked: `ids`, `labels` (-100 where visible) int64 `[B, N]`, and the rate `[B]`."""

    ids: Tensor
    labels: Tensor
    rate: Tensor


def mask_image(ids: Tensor, u_time: Tensor, u_order: Tensor, mask_id: int, min_rate: float = 0.0) -> NoisyCodes:
    """Hide max(1, round(N r)) image tokens of each row, r = max(cos(pi u_time / 2), min_rate).

    Args:
        ids: int64 `[B, N]`. u_time: `[B]`, uniforms.
        u_order: `[B, N]`, uniforms; position i is hidden where argsort(u_order)[i] < count (upstream takes the argsort
            itself for a random ranking; its law is the same as the inverse's).
    """
    rate = torch.cos(u_time * torch.pi * 0.5).clamp_min(min_rate)
    count = (ids.shape[1] * rate).round().clamp_min(1)
    hidden = u_order.argsort(dim=-1) < count[:, None]
    return NoisyCodes(torch.where(hidden, mask_id, ids), torch.where(hidden, ids, IGNORED), rate)


@dataclass(frozen=True)
class NoisyText:
    """Rows with answers masked: `ids` int64 `[B, L]`, chance of masking `[B]`, answer length int64 `[B]`."""

    ids: Tensor
    p_mask: Tensor
    answer_length: Tensor


def mask_answers(
    ids: Tensor, prompt: Tensor, u_time: Tensor, u_mask: Tensor, mask_id: int, eps: float = 1e-3
) -> NoisyText:
    """Hide each position outside the prompt with p = (1 - eps) u_time + eps (LLaDA, algorithm 2).

    Args:
        ids: int64 `[B, L]`. prompt: bool `[B, L]`. u_time: `[B]`. u_mask: `[B, L]`.
    """
    p = (1 - eps) * u_time + eps
    hidden = (u_mask < p[:, None]) & ~prompt.bool()
    return NoisyText(torch.where(hidden, mask_id, ids), p, (~prompt.bool()).sum(1))


def image_loss(logits: Tensor, labels: Tensor, first: int, markers: bool = False) -> Tensor:
    """Mean cross-entropy of masked image tokens, no weight.

    Args:
        logits: `[B, L, V]`. labels: int64 `[B, L]`, -100 where nothing is learnt.
        first: index of soi; the image's tokens follow.
        markers: soi and eoi, which are never masked, count as well (upstream).
    """
    stop = logits.shape[1] - (0 if markers else 1)
    part = slice(first if markers else first + 1, stop)
    return F.cross_entropy(logits[:, part].flatten(0, 1), labels[:, part].flatten(), ignore_index=IGNORED)


def answer_loss(
    logits: Tensor, labels: Tensor, masked: Tensor, p_mask: Tensor, answer_length: Tensor | None = None
) -> Tensor:
    """Sum over masked positions of ce / p / answer length, over the number of rows.

    Args:
        logits: `[B, L, V]`. labels: int64 `[B, L]`. masked: bool `[B, L]`. p_mask: `[B]`.
        answer_length: `[B]`; None divides by rows times L instead (LLaDA's pretraining).
    """
    if bool((labels[masked] == IGNORED).any()):
        raise ValueError("a masked position has no label; mask targets only")
    nll = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")  # [B, L]
    weighted = torch.where(masked, nll, 0.0) / p_mask[:, None]
    if answer_length is None:
        return weighted.sum() / masked.numel()
    return (weighted / answer_length[:, None]).sum() / len(masked)


def training_mask(visible: Tensor, float_bias: bool = False, dtype: torch.dtype = torch.float32) -> Tensor:
    """What may be seen in training, for `MaskedTransformer.hidden(attention_mask=...)`: `[B, 1, L, L]`.

    Args:
        visible: bool or 0/1 `[B, L]`, False on padding.
        float_bias: upstream's form, a float 0/1 tensor of `dtype` that is *added* to the scores: padding is weakened by
            a factor e and not hidden. (In rows without padding it is a constant and changes nothing.) By default a true
            mask, as in inference.
    """
    pairs = visible.bool()[:, None, :, None] & visible.bool()[:, None, None, :]
    return pairs.to(dtype) if float_bias else pairs
