"""Tensor parallelism: attention heads and feed-forward units of every block shared by several processes, through DTensor.

After Megatron-LM (Shoeybi et al. 2019, arXiv 1909.08053): `qkv` and `up` are split by their outputs, `out` and `down` by their
inputs, so that a block needs two sums over the processes. Packed layers are put in an order in which each process has its
own heads' queries, keys and values, and its own units' gates.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import get_rank, get_world_size, init_process_group, is_initialized
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from unidiff.models.transformer import MaskedTransformer
from unidiff.process import pick_device

PLAN = {"attention.qkv": "columns", "attention.out": "rows", "feed_forward.up": "columns", "feed_forward.down": "rows"}


def spread(model: MaskedTransformer, mesh: DeviceMesh | None = None) -> MaskedTransformer:
    """Share the blocks of a model among the processes of a mesh, in place; each then gives the logits of the whole.

    Every process calls it with the same weights, and then decodes the same rows from the same seeds. Embeddings, norms and
    the head are on all of them. The model can neither be saved nor take adapters any more.

    Args:
        mesh: of one dimension; None for all processes that `torchrun` started, each with an accelerator if there are any.

    Raises:
        ValueError: no processes, another model, or heads and units that they cannot share evenly.
    """
    mesh = _mesh() if mesh is None else mesh
    if not isinstance(model, MaskedTransformer):
        raise ValueError(f"a {type(model).__name__} cannot be spread over processes; expected a MaskedTransformer")
    c, size = model.settings, mesh.size()
    if c.qk_norm == "width":
        raise ValueError("a model with qk_norm='width' cannot be spread over processes: its norm spans all heads")
    for name, count in (("num_heads", c.num_heads), ("num_kv_heads", c.kv_heads), ("feed-forward units", c.inner_size)):
        if count % size:
            raise ValueError(f"the model has {count} {name}, which {size} processes cannot share evenly; start fewer")
    styles = {"columns": ColwiseParallel, "rows": RowwiseParallel}
    for block in model.blocks:
        attention: Any = block.attention
        feed: Any = block.feed_forward
        heads = [count * attention.head_dim for count in (attention.num_heads, *[attention.num_kv_heads] * 2)]
        _in_order(attention.qkv, heads, size)
        _in_order(feed.up, [c.inner_size] * (feed.up.out_features // c.inner_size), size)
        parallelize_module(block, mesh, {name: styles[kind]() for name, kind in PLAN.items()}, src_data_rank=None)
        attention.num_heads, attention.num_kv_heads = attention.num_heads // size, attention.num_kv_heads // size
    model.mesh = mesh
    return model.to(_device(mesh))


def _in_order(layer: nn.Linear, parts: Sequence[int], size: int) -> None:
    """Put the outputs of a packed layer in the order of the processes: of every part the first share, then the second, ..."""

    def ordered(value: Tensor) -> nn.Parameter:
        shares = [part.chunk(size) for part in value.split(list(parts))]
        return nn.Parameter(torch.cat([share[rank] for rank in range(size) for share in shares]), value.requires_grad)

    layer.weight = ordered(layer.weight.detach())
    if layer.bias is not None:
        layer.bias = ordered(layer.bias.detach())


def _mesh() -> DeviceMesh:
    place = pick_device("auto").type
    if not is_initialized():
        if "RANK" not in os.environ:
            raise ValueError(
                "tp_plan='auto' needs processes to spread over; start them with torchrun --nproc-per-node=N"
            )
        init_process_group("gloo" if place == "cpu" else None)
    return init_device_mesh(place, (get_world_size(),))


def _device(mesh: DeviceMesh) -> torch.device:
    place = torch.device(mesh.device_type)
    return place if place.type == "cpu" else torch.device(place.type, int(os.environ.get("LOCAL_RANK", get_rank())))
