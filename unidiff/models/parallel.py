"""Tensor parallelism: attention heads and feed-forward units of every block shared by several processes, through DTensor.

After Megatron-LM (Shoeybi et al. 2019, arXiv 1909.08053): `qkv` and `up` are split by their outputs, `out` and `down` by their
inputs, so that a block needs two sums over the processes. Packed layers are put in an order in which each process has its
own heads' queries, keys and values, and its own units' gates. Of a mixture, every process has its own experts and all tokens,
so that a sum over the processes takes the place of sending tokens about.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import get_rank, get_world_size, init_process_group, is_initialized
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from unidiff.models.experts import Experts, MixtureOfExperts
from unidiff.models.transformer import MaskedTransformer
from unidiff.process import pick_device


class OwnExperts(ParallelStyle):
    """Every process keeps its own of the stacked experts, and the sum of what all of them return is the output."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return distribute_module(module, device_mesh, _keep_own, output_fn=_add_up)  # type: ignore[arg-type]


def _keep_own(name: str, module: nn.Module, mesh: DeviceMesh) -> None:
    for key, value in list(module.named_parameters(recurse=False)):
        own = distribute_tensor(value.detach(), mesh, [Shard(0)], src_data_rank=None)
        module.register_parameter(key, nn.Parameter(own, value.requires_grad))
    assert isinstance(module, Experts)
    module.first = mesh.get_local_rank() * (module.count // mesh.size())


def _add_up(module: nn.Module, output: Tensor, mesh: DeviceMesh) -> Tensor:
    return DTensor.from_local(output, mesh, [Partial()]).redistribute(placements=[Replicate()]).to_local()


STYLES: dict[str, type[ParallelStyle]] = {"columns": ColwiseParallel, "rows": RowwiseParallel, "experts": OwnExperts}
PLAN = {"attention.qkv": "columns", "attention.out": "rows", "feed_forward.up": "columns", "feed_forward.down": "rows"}
MIXTURE_PLAN = {
    **{name: kind for name, kind in PLAN.items() if name.startswith("attention")},
    **{f"feed_forward.shared.{name}": kind for name, kind in (("up", "columns"), ("down", "rows"))},
    "feed_forward.experts": "experts",
}


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
    parts = {"num_heads": c.num_heads, "num_kv_heads": c.kv_heads, "num_experts": c.num_experts}
    dense = any(not c.has_experts(layer) for layer in range(c.num_layers))
    parts |= {"feed-forward units": c.inner_size if dense else 0, "units of the shared expert": c.shared_expert_size}
    for name, count in parts.items():
        if count % size:
            raise ValueError(f"the model has {count} {name}, which {size} processes cannot share evenly; start fewer")
    for block in model.blocks:
        attention: Any = block.attention
        feed: Any = block.feed_forward
        if mixed := isinstance(feed, MixtureOfExperts):
            if not isinstance(feed.experts, Experts):
                raise ValueError(
                    "experts in few bits or with adapters cannot be spread over processes; load plain weights"
                )
            feed = feed.shared
        heads = [count * attention.head_dim for count in (attention.num_heads, *[attention.num_kv_heads] * 2)]
        _in_order(attention.qkv, heads, size)
        if feed is not None:
            inner = feed.down.in_features
            _in_order(feed.up, [inner] * (feed.up.out_features // inner), size)
        plan = {name: STYLES[kind]() for name, kind in (MIXTURE_PLAN if mixed else PLAN).items()}
        if feed is None:
            plan = {name: style for name, style in plan.items() if ".shared." not in name}
        parallelize_module(block, mesh, plan, src_data_rank=None)
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
