"""What `unidiff benchmark` says of training on this machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from unidiff.process import pick_device
from unidiff.train.config import TrainConfig
from unidiff.train.cost.benchmark import (
    TrainingLoad,
    fit_to_memory,
    free_bytes,
    head_flops_ratio,
    measure_head,
    measure_step,
)
from unidiff.train.cost.plan import declared_vocabulary


def measure_training(
    config: TrainConfig, name: str, steps: int, head_only: bool, say: Callable[[str], None]
) -> dict[str, Any]:
    """Time the head and, unless `head_only`, `steps` steps of a run of random tokens; plain data of all that is said.

    Raises ValueError without a declared vocabulary and grid, for another network, or for a device that is not there.
    """
    if config.network != "masked":
        raise ValueError(
            f"network is {config.network!r}; steps are timed of masked transformers alone (network=masked), and "
            "`unidiff plan` counts the operations of this one"
        )
    if config.threads:
        torch.set_num_threads(config.threads)
    work = TrainingLoad(config, declared_vocabulary(config), pick_device(config.device).type)
    say(f"{name}: {config.batch_size} rows of {work.row.length} tokens, {work.vocabulary.size} ids, {work.device}, "
        f"{'bf16' if work.bf16 else 'fp32'}, torch {torch.__version__}, {torch.get_num_threads()} threads")  # fmt: skip
    fit = fit_to_memory(work, free_bytes(work.device))
    for note in fit.notes:
        say(f"cut             {note}")
    head = measure_head(fit.head)
    say(f"head and loss   streamed at masked positions   {head.seconds:8.3f} s   {head.memory_mib:8.0f} MiB")
    say(
        f"                log-softmax over all ids       {head.dense_seconds:8.3f} s   {head.dense_memory_mib:8.0f} MiB"
    )
    say(f"                {head.speedup:.1f} x faster, {head.memory_ratio:.1f} x less memory "
        f"({head_flops_ratio(work):.1f} x fewer operations)")  # fmt: skip
    shapes: dict[str, Any] = {"text_size": work.row.text_slice, "image_size": work.row.image_slice}
    shapes |= {"grid": config.data.grid, "text_length": config.data.text_length, "batch_size": config.batch_size}
    shapes |= {"model": dict(config.model), "bf16": work.bf16, "chunk": config.objective.chunk, "device": work.device}
    report: dict[str, Any] = {"work": shapes, "head": asdict(head)}
    if fit.notes:
        rows = {"head_rows": fit.head.config.batch_size, "step_rows": fit.step.config.batch_size}
        report["cut"] = rows | {"notes": list(fit.notes)}
    if head_only:
        return report
    step = measure_step(fit.step, steps)
    millions = step.parameters / 1e6
    say(f"step            {step.seconds:.3f} s, {step.tokens_per_second:.0f} tokens/s, {millions:.1f} M parameters")
    for part, seconds in step.parts.items():
        say(f"                {part:14s} {seconds:8.3f} s  {100 * seconds / step.seconds:5.1f} %")
    say(f"                {step.flops_per_step / 1e9:.1f} GFLOP, matmul peak {step.peak_flops / 1e9:.0f} GFLOP/s, "
        f"use {100 * step.mfu:.1f} %, memory {step.memory_mib:.0f} MiB")  # fmt: skip
    return report | {"step": asdict(step) | {"mfu": step.mfu}}
