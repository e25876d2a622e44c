"""Classifier-free guidance: what the unconditional passes hide, how strong it is, and how logits are mixed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from unidiff.decoding.config import Guidance
from unidiff.tokens import Modality, TokenBatch


def full_scale(guidance: Guidance, modality: Modality) -> float:
    """Guidance scale of a modality at full strength; 1 means that it is never guided."""
    own = guidance.text_scale if modality == Modality.TEXT else guidance.image_scale
    return guidance.scale if own is None else own


def scale_at(guidance: Guidance, modality: Modality, time: Tensor) -> Tensor:
    """Guidance scale s `[B]` at diffusion time t (1 = all masked); see `Guidance`. 1 means off."""
    full = full_scale(guidance, modality)
    if guidance.mode == "ramp":
        return 1 + (full - 1) * (1 - time)
    if guidance.mode == "window":
        start, stop = guidance.window
        inside = (1 - time >= start) & (1 - time <= stop)
        return torch.where(inside, full, torch.ones_like(time))
    return torch.full_like(time, full)


def hidden_from(guidance: Guidance, modality: Modality, batch: TokenBatch, condition: Tensor | None) -> Tensor:
    """bool `[B, L]`: what the unconditional pass for targets of `modality` does not see."""
    if condition is not None:
        return condition & batch.given & batch.valid
    known = batch.given & batch.valid
    if guidance.hide == "given":
        return known
    if guidance.hide == "other":
        return batch.valid & (batch.modality != modality)
    return known & (batch.modality == (Modality.TEXT if guidance.hide == "text" else Modality.IMAGE))


def mix(
    conditional: Tensor,
    unconditional: Tensor,
    scale: Tensor,
    others: Sequence[Tensor] | Tensor = (),
    further: Sequence[float] = (),
) -> Tensor:
    """uncond + s (cond - uncond), written so that s = 1 returns cond bit by bit; -inf of cond stays.

    Args:
        conditional, unconditional: logits `[B, n, V]`.
        scale: `[B]`.
        others, further: more unconditional logits and their scales: each adds (s_k - 1) (cond - other_k).
    """
    s = scale.to(conditional.dtype)[:, None, None]
    mixed = conditional + (s - 1) * (conditional - unconditional)
    mixed = torch.where(s == 1, conditional, mixed)
    for other, extra in zip(others, further, strict=True):
        mixed = mixed + (extra - 1) * (conditional - other)
    return torch.where(conditional == -torch.inf, conditional, mixed)
