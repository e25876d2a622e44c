"""Measure training on this machine: tokens per second, where a step's time goes, memory, and use of the matmul peak.

    python training/benchmark.py [smoke | unidisc-small | CONFIG.yaml] [--head-only] [--steps N] [--json FILE] [key=value ...]

Tokens are random; nothing is downloaded or written unless --json names a file. A CONFIG needs data.vocabulary and data.grid.
Where its batch does not fit into the free memory, fewer rows are measured, and the output says so.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from unidiff.files import check_writable, replace_text
from unidiff.process import exit_status, parsed, set_up_process
from unidiff.train.config import read_config

set_up_process(os.environ)
_HERE = Path(__file__).resolve().parent.parent / "configs"
_SMOKE = ["model={hidden_size: 64, num_layers: 2, num_heads: 2}", "batch_size=4", "data.text_length=16", "data.grid=4"]
_SMOKE += ["data.vocabulary=unidisc-magvit", "objective.chunk=32"]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", default="smoke")
    parser.add_argument("--head-only", action="store_true", help="compare the two heads and stop")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="*", help="settings as in pretrain.py, for instance batch_size=8")
    options = parsed(parser, arguments)

    def measure() -> None:
        check_writable(options.json)
        report = run(options.what, options.overrides, options.steps, options.head_only)
        if options.json:
            replace_text(options.json, json.dumps(report, indent=1) + "\n")

    return exit_status(measure)


def run(what: str, overrides: list[str], steps: int, head_only: bool) -> dict[str, Any]:
    if not 1 <= steps <= 10_000:
        raise ValueError(f"--steps is {steps}; expected a number from 1 to 10,000")
    named = _HERE / f"{what}.yaml"
    path = None if what == "smoke" else named if named.is_file() else what
    config = read_config(path, [*(_SMOKE if path is None else []), *overrides])

    import torch

    from unidiff.process import pick_device
    from unidiff.train.cost.benchmark import (
        TrainingLoad,
        fit_to_memory,
        free_bytes,
        head_flops_ratio,
        measure_head,
        measure_step,
    )
    from unidiff.train.cost.plan import declared_vocabulary

    if config.threads:
        torch.set_num_threads(config.threads)
    work = TrainingLoad(config, declared_vocabulary(config), pick_device(config.device).type)
    print(f"{what}: {config.batch_size} rows of {work.row.length} tokens, {work.vocabulary.size} ids, {work.device}, "
          f"{'bf16' if work.bf16 else 'fp32'}, torch {torch.__version__}, {torch.get_num_threads()} threads")  # fmt: skip
    fit = fit_to_memory(work, free_bytes(work.device))
    for note in fit.notes:
        print(f"cut             {note}")
    head = measure_head(fit.head)
    print(f"head and loss   streamed at masked positions   {head.seconds:8.3f} s   {head.memory_mib:8.0f} MiB")
    print(
        f"                log-softmax over all ids       {head.dense_seconds:8.3f} s   {head.dense_memory_mib:8.0f} MiB"
    )
    print(f"                {head.speedup:.1f} x faster, {head.memory_ratio:.1f} x less memory "
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
    print(
        f"step            {step.seconds:.3f} s, {step.tokens_per_second:.0f} tokens/s, {step.parameters / 1e6:.1f} M parameters"
    )
    for name, seconds in step.parts.items():
        print(f"                {name:14s} {seconds:8.3f} s  {100 * seconds / step.seconds:5.1f} %")
    print(f"                {step.flops_per_step / 1e9:.1f} GFLOP, matmul peak {step.peak_flops / 1e9:.0f} GFLOP/s, "
          f"use {100 * step.mfu:.1f} %, memory {step.memory_mib:.0f} MiB")  # fmt: skip
    return report | {"step": asdict(step) | {"mfu": step.mfu}}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
