"""What a run would need, before it is started: memory per GPU, operations, days, and how to spread it.

    python training/plan.py CONFIG [--gpus N] [--memory GiB] [--tflops RATE] [key=value ...]

RATE is what one GPU keeps up in training, in TFLOP/s; training/benchmark.py measures it. No data and no GPU is needed.
The config must declare data.vocabulary and data.grid.
"""

from __future__ import annotations

import argparse
import sys

from unidiff.process import exit_status, parsed
from unidiff.train.config import read_config


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--memory", type=float, help="GiB of one GPU that the run may fill")
    parser.add_argument("--tflops", type=float, help="rate that one GPU keeps up in training, in TFLOP/s")
    parser.add_argument("overrides", nargs="*", help="settings as in pretrain.py")
    options = parsed(parser, arguments)
    return exit_status(lambda: show(options))


def show(options: argparse.Namespace) -> None:
    for name in ("memory", "tflops"):
        value = getattr(options, name)
        if value is not None and not 0 < value < 1e12:
            raise ValueError(f"--{name} is {value}; expected a number above 0")
    config = read_config(options.config, options.overrides)

    from unidiff.train.cost.plan import GIB, make_plan

    plan = make_plan(config, options.gpus)
    size, row = plan.size, plan.row
    print(f"parameters   {size.total / 1e6:.1f} M: blocks {size.blocks / 1e6:.1f}, embeddings {size.embedding / 1e6:.1f}, "
          f"head {size.head / 1e6:.1f}")  # fmt: skip
    print(f"rows         {row.text} text + {row.image} image tokens; {plan.rows_per_step} rows, "
          f"{plan.rows_per_step * row.length} tokens per step; {plan.rows_per_gpu} rows per GPU and pass")  # fmt: skip
    parts = plan.flops
    print(f"operations   {plan.step_flops / 1e12:.2f} TFLOP per step: blocks {100 * parts.blocks / parts.total:.0f} %, "
          f"attention {100 * parts.attention / parts.total:.0f} %, head {100 * parts.head / parts.total:.0f} %")  # fmt: skip
    print(f"state        {plan.state_bytes / GIB:.2f} GiB: weights, gradients, optimiser, moving average")
    print(f"{'GiB per GPU':35s} weights  activations    head   total")
    for layout in plan.layouts:
        numbers = [x / GIB for x in (layout.weights, layout.activations, layout.head, layout.total)]
        print(f"  {layout.settings:60s}"[:62] + " ".join(f"{n:9.2f}" for n in numbers))
    if options.memory is not None:
        fitting = plan.fitting(options.memory * GIB)
        if fitting:
            print(f"fits         {options.memory:g} GiB with {fitting.settings}")
        else:
            print(
                f"fits         nothing in {options.memory:g} GiB; lower batch_size and raise accumulate, or use more GPUs"
            )
    if options.tflops is not None:
        print(
            f"time         {plan.days(options.gpus, options.tflops * 1e12):.2f} days for {plan.steps} steps on {options.gpus} GPUs"
        )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
