"""Keyed noise, and the masking process q(x_t | x) = Cat(alpha_t x + (1 - alpha_t) m), independently per position.

A uniform draw is a pure function of (seed, key, stream, index), not of call order or batch shape. Training keys its times
and masks by global sample index, the sampler by row seed and step; so neither batch size, padding, worker count nor rank
count changes a draw. The mixer is SplitMix64 (Steele, Lea, Flood 2014), in int64 tensor arithmetic that wraps the same way
on every device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unidiff.tokens import TokenBatch, Vocabulary

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def keyed_bits(seed: int | Tensor, keys: Tensor, stream: int | Tensor, count: int) -> Tensor:
    """int64 `[*keys.shape, count]` of hashed bits for (seed, key, stream, index).

    Args:
        seed: an int, or int64 broadcastable to `keys`.
        keys: int64 of any shape, for instance global sample indices or row seeds.
        stream: separates independent uses, for instance a step number; an int, or int64 broadcastable to `keys`.
        count: draws per key; draw `i` does not depend on `count`.
    """
    state = _mix(_on(keys.device, seed) + _GOLDEN)
    state = _mix(state ^ (keys * _MIX_1 + _GOLDEN))
    state = _mix(state ^ (_on(keys.device, stream) * _MIX_2 + _GOLDEN))
    index = torch.arange(1, count + 1, device=keys.device, dtype=torch.long)
    return _mix(state[..., None] + index * _GOLDEN)


def keyed_uniform(seed: int | Tensor, keys: Tensor, stream: int | Tensor, count: int) -> Tensor:
    """float64 `[*keys.shape, count]`, uniform on the open interval (0, 1); 53 random bits each. See `keyed_bits`."""
    bits = (keyed_bits(seed, keys, stream, count) >> 11) & ((1 << 53) - 1)
    return (bits.double() + 0.5) * 2.0**-53


def _on(device: torch.device, value: int | Tensor) -> Tensor:
    """int64 on a device; whole numbers wrap to 64 bits, and are written there without an upload."""
    if isinstance(value, Tensor):
        return value.to(device)
    return torch.full((), (value + 2**63) % 2**64 - 2**63, device=device)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * _MIX_1
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _MIX_2
    return x ^ ((x >> 31) & ((1 << 33) - 1))


@dataclass(frozen=True)
class NoisyBatch:
    """x_t: `batch` with hidden ids replaced by their modality's [MASK], and `masked`, bool `[B, L]`, where it is hidden."""

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
    """Hide exactly `count[b]`, int64 `[B]`, uniformly chosen targets of row b (all of them where it has fewer).

    The uniforms `noise` `[B, L]` rank the targets.
    """
    ranked = noise.masked_fill(~batch.targets, torch.inf)
    rank = ranked.argsort(dim=1, stable=True).argsort(dim=1, stable=True)  # [B, L]
    masked = batch.targets & (rank < count[:, None])
    return NoisyBatch(batch.hide(masked, vocabulary), masked)
