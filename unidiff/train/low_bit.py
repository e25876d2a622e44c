"""AdamW whose moments are kept in 8 bits, by torchao (Dettmers et al. 2021, arXiv 2110.02861).

256 neighbouring values share a float32 scale. Moments of parameters with fewer than 4,096 values, or not made of whole
blocks, stay in float32; so do the weights, and the arithmetic of an update.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from unidiff.train.config import OptimiserConfig

_BLOCK, _SMALLEST = 256, 4096
_PARTS = ("codes", "scale")  # uint8, of the parameter's shape; float32, one per block. The table of levels is fixed.


def adamw_8bit(groups: list[dict[str, Any]], config: OptimiserConfig) -> Optimizer:
    """torchao's optimiser over parameter groups.

    Raises:
        ValueError: torchao is not installed, or parameters are sharded: blocks would not fit another number of shards.
    """
    try:
        from torchao.optim import AdamW8bit
    except ImportError as error:
        raise ValueError(
            "optimiser.state_bits = 8 needs torchao; run pip install 'unidiff[quantise]' or set optimiser.state_bits=32"
        ) from error
    if any(isinstance(p, DTensor) for group in groups for p in group["params"]):
        raise ValueError(
            "optimiser.state_bits = 8 does not go with parallel.mode=fsdp, which shards the state already; "
            "set parallel.mode=ddp or optimiser.state_bits=32"
        )
    return AdamW8bit(groups, config.lr, (config.beta1, config.beta2), config.eps, block_size=_BLOCK)


def uncompiled(parameters: list[nn.Parameter]) -> AbstractContextManager[object]:
    """Around `step`: torchao compiles the update, which is wanted on CUDA and needs a C++ compiler on the CPU."""
    if any(p.device.type == "cuda" for p in parameters):
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


def unpacked(entry: dict[str, Any]) -> dict[str, Any]:
    """One parameter's state with plain tensors only: `exp_avg` in 8 bits becomes `exp_avg.codes` and `exp_avg.scale`."""
    from torchao.optim.subclass_8bit import OptimState8bit

    plain: dict[str, Any] = {}
    for key, value in entry.items():
        if isinstance(value, OptimState8bit):
            plain |= {f"{key}.{part}": getattr(value, part) for part in _PARTS}
        else:
            plain[key] = value
    return plain


def packed(entry: dict[str, Tensor], parameter: nn.Parameter) -> dict[str, Any]:
    """Inverse of `unpacked` for the state of `parameter`. Raises ValueError where its moments were kept in 32 bits."""
    from torchao.optim.subclass_8bit import OptimState8bit

    large = parameter.numel() >= _SMALLEST and parameter.numel() % _BLOCK == 0
    if large and "exp_avg" in entry:
        raise ValueError("the checkpoint's AdamW state has 32 bits, this run's 8; set optimiser.state_bits=32")
    state: dict[str, Any] = {key: value for key, value in entry.items() if "." not in key}
    for key in {key.split(".")[0] for key in entry} - set(state):
        # the first moment has a sign, the second has none
        value = OptimState8bit.zeros(parameter.shape, key == "exp_avg", _BLOCK, parameter.device, parameter.dtype)
        for part in _PARTS:
            getattr(value, part).copy_(entry[f"{key}.{part}"])
        state[key] = value
    return state
