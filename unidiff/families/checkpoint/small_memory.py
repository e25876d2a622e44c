"""Inference with less memory: weights in int8 or int4 (torchao), or most of them kept off the device (accelerate)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from unidiff.models.experts import Router, list_experts

BLOCKS = ("blocks.", "double_blocks.", "single_blocks.")
PACKED = "qkv"  # caches take rows of these weights, so they stay sliceable and on the device
KINDS = ("int8", "int4")
M = TypeVar("M", bound=nn.Module)


def quantise(model: M, kind: str = "int8", group_size: int = 32) -> M:
    """Store the linear layers of all blocks in few bits, one after the other, and compute in the model's own dtype.

    The memory falls when it is done: the whole model has to be there first, and torchao's working copies come on top.
    Embeddings, norms and heads keep their dtype. "int4" stores packed queries, keys and values in int8, because caches
    read rows of them, which int4's layout does not allow. Experts become linear layers of their own, routers keep their dtype.

    Args:
        model: a `MaskedTransformer` or `MMDiT`, on its device and in its dtype (bfloat16, say); changed in place.
        kind: "int8" (symmetric, per row) or "int4" (groups of `group_size` along a row).
        group_size: 32, 64, 128 or 256; has to divide the width of every layer.

    Raises:
        ImportError: torchao is not installed.
        ValueError: another kind, or a layer that the groups do not divide.
    """
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; expected one of {list(KINDS)}")
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise ImportError("int8 and int4 weights need torchao; pip install 'unidiff[quantise]'") from error
    list_experts(model)
    layers = block_layers(model)
    if kind == "int4" and (odd := [n for n, m in layers.items() if m.in_features % group_size and PACKED not in n]):
        width = layers[odd[0]].in_features
        raise ValueError(f"{odd[0]} is {width} wide, which groups of {group_size} do not divide; choose another size")
    few = {name for name in layers if kind == "int4" and name.rpartition(".")[2] != PACKED}
    quantize_(model, Int8WeightOnlyConfig(set_inductor_config=False), lambda m, name: name in layers.keys() - few)
    if few:
        device = next(model.parameters()).device
        quantize_(model, _int4(device, group_size), lambda m, name: name in few)
    return model


def offload(model: M, device: torch.device | str, folder: str | Path | None = None) -> M:
    """Keep most linear layers of all blocks in host memory, or on disk, and bring each to the device while it computes.

    Packed queries, keys and values, embeddings, norms, routers and heads stay on the device, so every cache works. Of the
    experts, those come that have a token to work on.

    Args:
        model: a `MaskedTransformer` or `MMDiT` on the CPU; changed in place. device: where to compute.
        folder: where to put the weights on disk; None for host memory.

    Raises:
        ImportError: accelerate is not installed.
        ValueError: weights on another device than the CPU, or a model without blocks.
    """
    try:
        from accelerate import cpu_offload, disk_offload
    except ImportError as error:
        raise ImportError("offloading needs accelerate; pip install 'unidiff[offload]'") from error
    list_experts(model)
    layers = {name: layer for name, layer in block_layers(model).items() if name.rpartition(".")[2] != PACKED}
    if away := [name for name, value in model.named_parameters() if value.device.type != "cpu"]:
        raise ValueError(f"{away[0]} is not on the CPU; offload a model that was loaded there")
    execution = torch.device(device)
    for name, layer in layers.items():
        if folder is None:
            cpu_offload(layer, execution)
        else:
            disk_offload(layer, str(Path(folder) / name), execution)
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if name.rpartition(".")[0] not in layers:
            value.data = value.data.to(execution)
    return model


def block_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers inside the blocks by name, without routers; `ValueError` for a model without any."""
    modules = ((n, m) for n, m in model.named_modules() if n.startswith(BLOCKS) and not isinstance(m, Router))
    found = {n: m for n, m in modules if isinstance(m, nn.Linear)}
    if not found:
        raise ValueError(f"{type(model).__name__} has no blocks with linear layers; expected a denoiser of unidiff")
    return found


def _int4(device: torch.device, group_size: int) -> Any:
    """torchao's int4 layout for a device: each kernel has its own."""
    if device.type == "cpu":
        from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

        return PrototypeInt4WeightOnlyConfig(group_size=group_size, set_inductor_config=False)
    from torchao.quantization import Int4WeightOnlyConfig

    return Int4WeightOnlyConfig(group_size, set_inductor_config=False, int4_packing_format="tile_packed_to_4d")
