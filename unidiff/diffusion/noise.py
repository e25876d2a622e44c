"""Keyed noise: a uniform draw is a pure function of (seed, key, stream, index), not of call order or batch shape.

Training keys its times and masks by global sample index, the sampler by row seed and step; so neither batch size,
padding, worker count nor rank count changes a draw. The mixer is SplitMix64 (Steele, Lea, Flood 2014), in int64
tensor arithmetic that wraps the same way on every device.
"""

from __future__ import annotations

import torch
from torch import Tensor

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
    if isinstance(seed, int):
        seed = torch.tensor(_signed(seed), device=keys.device)
    if isinstance(stream, int):
        stream = torch.tensor(_signed(stream), device=keys.device)
    state = _mix(seed.to(keys.device) + _GOLDEN)
    state = _mix(state ^ (keys * _MIX_1 + _GOLDEN))
    state = _mix(state ^ (stream.to(keys.device) * _MIX_2 + _GOLDEN))
    index = torch.arange(1, count + 1, device=keys.device, dtype=torch.long)
    return _mix(state[..., None] + index * _GOLDEN)


def keyed_uniform(seed: int | Tensor, keys: Tensor, stream: int | Tensor, count: int) -> Tensor:
    """float64 `[*keys.shape, count]`, uniform on the open interval (0, 1); 53 random bits each. See `keyed_bits`."""
    bits = (keyed_bits(seed, keys, stream, count) >> 11) & ((1 << 53) - 1)
    return (bits.double() + 0.5) * 2.0**-53


def _mix(x: Tensor) -> Tensor:
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * _MIX_1
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _MIX_2
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def _signed(value: int) -> int:
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >= 1 << 63 else value
