"""What a run of a dual model would cost: its network runs on tensors that have shapes and no values, and is watched.

torch's counter counts the operations of matrix products, and every tensor that autograd keeps is measured. The backward pass
counts twice the forward pass, as in `unidiff.train.cost.plan`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from unidiff.diffusion.streamed_nll import TILE_ELEMENTS
from unidiff.models.block import SCORES
from unidiff.models.dual_transformer import DualTransformer
from unidiff.models.trained_on import TASKS
from unidiff.train.build import set_up_blocks
from unidiff.train.config import TaskConfig, TrainConfig
from unidiff.train.cost.plan import (
    Layout,
    ModelSize,
    Plan,
    RowFlops,
    TrainingRow,
    declared_vocabulary,
    mean_rate,
    rows_per_gpu,
    state_bytes,
)
from unidiff.train.dual import dual_arguments

_FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_ATTENTION = ("aten.bmm", str(_FUSED))  # what is no product with weights


class WatchedPass(NamedTuple):
    """One row in the forward pass: operations of linear layers and of attention, bytes that autograd keeps of it, and bytes
    that it keeps whatever the rows, such as bf16 copies of weights."""

    linear: float
    attention: float
    kept: float
    shared: float


def plan_dual(config: TrainConfig, gpus: int) -> Plan:
    """Count a run of `network: dual`. Raises as `make_plan`, and for settings that a dual model has not."""
    rows, ids, data = rows_per_gpu(config, gpus), declared_vocabulary(config), config.data
    arguments, _ = dual_arguments(config, ids, (data.grid, data.grid))
    size, shown, hidden = dual_size(arguments), *task_shares(config)
    row = TrainingRow(data.text_length, data.grid**2, ids.text_size, 0, hidden)
    bf16 = config.precision == "bf16"
    ways = {again: watch(arguments, row.text, shown, bf16, again) for again in (False, True)}
    head = 3 * 2 * size.hidden_size * hidden * row.text * row.text_slice
    flops = RowFlops(3 * ways[False].linear, 3 * ways[False].attention, head)
    state = state_bytes(config, size)
    one_block = (ways[False].kept - ways[True].kept) / size.num_layers  # computed again in the backward pass
    layouts = tuple(
        Layout(
            "ddp",
            1,
            again,
            weights=round(state + way.shared),
            activations=round(rows * (way.kept + (one_block if again else 0))),
            head=3 * 4 * TILE_ELEMENTS + 4 * max(size.head, size.embedding),
        )
        for again, way in ways.items()
    )
    return Plan(size, row, flops, config.rows_per_step, rows, config.steps, state, layouts)


def dual_size(arguments: Mapping[str, Any]) -> ModelSize:
    """Count a `DualTransformer` without making its weights. Blocks are those of the network and of the text encoder; of the
    network's two streams a token passes one."""
    with torch.device("meta"):
        model = DualTransformer(**arguments)
    network, encoder = model.network.double_blocks, model.text_encoder.block
    inside = [p for part in (network, encoder) for p in part.parameters()]
    count = lambda weights: sum(p.numel() for p in weights)  # noqa: E731
    width = model.network.config.num_heads * model.network.config.head_dim
    heads = [p for p in model.head_parameters() if p is not None]
    total = count(model.parameters())
    return ModelSize(
        total=total,
        active=total,
        block_linear=count(p for p in network.parameters() if p.ndim == 2) // 2,
        matrices=count(p for p in inside if p.ndim == 2),
        stacked=0,
        pair_flops=4 * width * len(network),
        blocks=count(inside),
        embedding=count(model.text_encoder.embed_tokens.parameters()),
        head=count(heads),
        hidden_size=width,
        num_layers=len(network),
    )


def task_shares(config: TrainConfig) -> tuple[float, float]:
    """Of the mean row of the task mixture: how many have a picture, and the share of the text that is hidden."""
    tasks: dict[str, TaskConfig] = {name: getattr(config.tasks, name) for name in TASKS}
    whole = sum(task.weight for task in tasks.values())
    without = {name: task.dropout for name, task in tasks.items() if name in ("caption", "answer")} | {"text": 1.0}
    absent = sum(tasks[name].weight * share for name, share in without.items())
    hidden = sum(task.weight * mean_rate(task) for name, task in tasks.items() if name != "text_to_image")
    return 1 - absent / whole, hidden / whole


def watch(arguments: Mapping[str, Any], text: int, shown: float, bf16: bool, again: bool) -> WatchedPass:
    """The mean row of a pass, a share `shown` of which have pictures; with `again` blocks are computed again in the backward
    pass."""
    with_picture, without = (_watch(arguments, text, picture, bf16, again) for picture in (True, False))
    mean = lambda one, other: shown * one + (1 - shown) * other  # noqa: E731
    return WatchedPass(
        mean(with_picture.linear, without.linear),
        mean(with_picture.attention, without.attention),
        mean(with_picture.kept, without.kept),
        max(with_picture.shared, without.shared),
    )


def _watch(arguments: Mapping[str, Any], text: int, picture: bool, bf16: bool, again: bool) -> WatchedPass:
    side, found = arguments["grid"], []
    with FakeTensorMode():
        model = DualTransformer(**arguments).train()
        if again:
            set_up_blocks(model, "full", compiled=False)  # type: ignore[arg-type]
        weights = {p.untyped_storage()._cdata for p in model.parameters()}
        few = SCORES // text**2 + 1  # so many rows that attention is one kernel on a CPU too, which keeps no scores
        for rows in (few, 2 * few):
            kept: dict[int, tuple[int, Tensor]] = {}

            def keep(x: Tensor, kept: dict[int, tuple[int, Tensor]] = kept) -> Tensor:
                place = x.untyped_storage()
                if place._cdata not in weights:
                    kept[place._cdata] = place.nbytes(), x  # held, so that no other tensor gets its place
                return x

            ids = torch.zeros(rows, text, dtype=torch.long)
            latents = torch.zeros(rows, arguments["code_dim"], side, side) if picture else None
            watched = torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x)
            counter = FlopCounterMode(display=False, custom_mapping={_FUSED: _fused_flops})
            with watched, counter as flops, torch.autocast("cpu", enabled=bf16):
                model.hidden(ids, latents, torch.zeros(rows))
            counts = {str(name): count for name, count in flops.get_flop_counts()["Global"].items()}
            pairs = sum(counts.get(name, 0) for name in _ATTENTION)
            found.append((sum(counts.values()) - pairs, pairs, sum(size for size, _ in kept.values())))
    linear, attention, kept_of_row = ((second - first) / few for first, second in zip(*found, strict=True))
    return WatchedPass(linear, attention, kept_of_row, found[0][2] - few * kept_of_row)


def _fused_flops(query: Any, key: Any, value: Any, *others: Any, **options: Any) -> int:
    """Operations of attention, of shapes `[B, H, L, d]`; torch's counter does not know the kernel of the CPU."""
    return int(sdpa_flop_count(query, key, value))
