"""The masking process: forward noise q(x_t | x), the posterior q(x_s | x_t, x), and the reverse step it gives.

q(x_t | x) = Cat(alpha_t x + (1 - alpha_t) m), independently per position. Noise comes in as uniforms, so a caller may
key it by sample and position (`unidiff.diffusion.noise`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unidiff.tokens import TokenBatch, Vocabulary


@dataclass(frozen=True)
class NoisyBatch:
    """x_t and where it is masked.

    Attributes:
        batch: the input batch with hidden ids replaced by their modality's [MASK].
        masked: bool `[B, L]`, the target positions that were hidden.
    """

    batch: TokenBatch
    masked: Tensor


def mask_tokens(batch: TokenBatch, rate: Tensor, vocabulary: Vocabulary, noise: Tensor) -> NoisyBatch:
    """Draw x_t ~ q(x_t | x): hide each target (valid, not given) where `noise < rate`.

    Args:
        batch: clean ids `[B, L]`.
        rate: mask rates 1 - alpha(t), `[B]` (one shared t per row) or `[B, L]` (per modality, block or task).
        noise: uniforms `[B, L]`.
    """
    rate = rate[:, None] if rate.ndim == 1 else rate
    masked = batch.targets & (noise < rate)
    return NoisyBatch(batch.hide(masked, vocabulary), masked)


def mask_count(batch: TokenBatch, count: Tensor, vocabulary: Vocabulary, noise: Tensor) -> NoisyBatch:
    """Hide exactly `count[b]` uniformly chosen targets of row b (all of them where it has fewer).

    Args:
        batch: clean ids `[B, L]`.
        count: int64 `[B]`.
        noise: uniforms `[B, L]`, which rank the targets.
    """
    ranked = noise.masked_fill(~batch.targets, torch.inf)
    rank = ranked.argsort(dim=1, stable=True).argsort(dim=1, stable=True)  # [B, L]
    masked = batch.targets & (rank < count[:, None])
    return NoisyBatch(batch.hide(masked, vocabulary), masked)
