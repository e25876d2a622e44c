"""Paired timings of decodes with and without caches, on random weights, beside what the caches could gain at most."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
from torch import nn

from unidiff.decoding import ModalityDecoding, RefreshPolicy, Sampler, SamplerConfig, SamplerOutput
from unidiff.decoding.cache.bounds import speedup_bound
from unidiff.decoding.row_decode import RowDecode
from unidiff.evaluation.benchmark import speed
from unidiff.evaluation.benchmark.cells import Cells, code_hash
from unidiff.evaluation.benchmark.result import Benchmark, TimedDecode
from unidiff.evaluation.benchmark.suites import SUITES, RandomDecode, ShapeSuite, cache_named, pick
from unidiff.models.transformer import MaskedTransformer
from unidiff.schema import Between, check_fields
from unidiff.tokens import Modality, Span, TokenBatch, Vocabulary

Count = Annotated[int, Between(1, 2**40)]
Progress = Callable[[str], None]


@dataclass(frozen=True)
class SuiteOptions:
    """How much of a suite to run.

    Args:
        only: policies to compare with `none`; all of the suite's when empty.
        blocks: blocks to decode of each row, evenly spread; None for all.
        runs: paired runs, device: where; None for the suite's. threads: of the CPU; None leaves it as it is.
        seed: of weights, tokens and decodes.
        graphs: record passes as CUDA graphs and replay them, see `unidiff.decoding.graphs`; nothing on a CPU.
        shapes: tokens of the rows to decode, as `128+1024` for text and image; all of the suite's when empty.
        cells: folder in which finished workloads are kept, so that a run that was interrupted goes on; None for none.
    """

    only: tuple[str, ...] = ()
    blocks: Count | None = None
    runs: Count | None = None
    threads: Annotated[int, Between(1, 1024)] | None = None
    device: str | None = None
    seed: Annotated[int, Between(0, 2**40)] = 0
    graphs: bool = False
    shapes: tuple[str, ...] = ()
    cells: Path | None = None

    def __post_init__(self) -> None:
        check_fields(self, "benchmark")


def run_suite(name: str, options: SuiteOptions, progress: Progress = lambda what: None) -> Benchmark:
    """Run a suite of random-weight models.

    Raises:
        ValueError: an unknown suite, policy or shape, or a device that is not there.
    """
    pick((name,), SUITES, "suite")
    suite = SUITES[name]
    for policy in options.only:
        cache_named(policy)
    pick(options.shapes, dict.fromkeys(w.shape for w in suite.workloads), "shape")
    device = speed.usable_device(options.device or suite.device)
    with speed.thread_count(options.threads):
        here, runs = speed.machine(device), options.runs or suite.runs
        about = {"model": dict(suite.model), "what": suite.about, **here, "blocks": options.blocks or "all"}
        result = Benchmark(name, about=about | {"runs": runs, "graphs": options.graphs, "matmul": []})
        model = random_model(suite, device, options.seed)
        own = {k: v for k, v in asdict(suite).items() if k not in ("workloads", "about")}
        asked = {k: v for k, v in asdict(options).items() if k not in ("shapes", "cells")} | {"runs": runs}
        kept = {"suite": own, "options": asked | {"threads": here["threads"]}, "code": code_hash(), "machine": here}
        for workload in suite.workloads:
            if options.shapes and workload.shape not in options.shapes:
                continue
            progress(workload.describe())
            nn.Module.to(model, getattr(torch, workload.dtype))  # without diffusers' advice on loading
            measure = lambda: measure_workload(suite, workload, model, options)  # noqa: B023, E731
            cell = f"{workload.shape}-{workload.dtype}-{workload.block}x{workload.passes}-{workload.batch}"
            cells = options.cells and Cells(options.cells)
            found = cells.measured(cell, {**kept, "workload": asdict(workload)}, measure) if cells else measure()
            result.rows += [TimedDecode(**row) for row in found["rows"]]
            result.about["matmul"].append(found["matmul"])
    return result


def random_model(suite: ShapeSuite, device: torch.device, seed: int) -> MaskedTransformer:
    """Weights that let every position differ. (A fresh model's branches are silent, so all of them would tie.)"""
    torch.manual_seed(seed)
    with device:
        model = MaskedTransformer(suite.vocabulary.size, **suite.model).eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
    return model


def request(
    schedule: RowDecode, grid: tuple[int, int] | None, vocabulary: Vocabulary, rows: int, seed: int
) -> TokenBatch:
    """Rows of random tokens, with the segments of a schedule to be decoded."""
    generator = torch.Generator().manual_seed(seed)
    spans = []
    for modality in Modality:
        own = [torch.full((s.tokens,), s.given) for s in schedule.segments if s.modality == modality]
        if own:
            given = torch.cat(own)
            ids = torch.randint(*vocabulary.range_of(modality), given.shape, generator=generator)
            image = grid if modality == Modality.IMAGE else None
            spans.append(Span.text(ids, given) if image is None else Span.image(ids.view(image), given.view(image)))
    return TokenBatch.from_spans([spans] * rows)


def measure_workload(
    suite: ShapeSuite, workload: RandomDecode, model: MaskedTransformer, options: SuiteOptions
) -> dict[str, Any]:
    """All policies of one decode, run after run in turn: `rows` (fields of `TimedDecode`) and `matmul`, the rates."""
    vocabulary, device, rows = suite.vocabulary, model.device, workload.batch
    schedule = workload.schedule(vocabulary, options.blocks)
    short = workload.schedule(vocabulary, 1, min(workload.passes, 3))
    peak = speed.matmul_peak(suite.peak_size, model.dtype, device)
    rates = speed.measure_rates(model, speed.row_counts(schedule.length * rows, schedule.block * rows))
    bandwidth = speed.copy_bandwidth(suite.copy_bytes, device)
    hidden = request(schedule, workload.grid, vocabulary, rows, options.seed).to(device).hide_targets(vocabulary)
    about = {
        "workload": workload.describe(),
        "peak": peak,
        "bandwidth": bandwidth,
        "rates": {str(n): rate for n, rate in rates.points},
        "steps": speed.measure_steps(model, hidden, schedule, peak, bandwidth),
    }
    names = dict.fromkeys(("none", *(options.only or suite.policies)))
    policies = {name: cache_named(name).build() for name in names}

    def decode(policy: RefreshPolicy, schedule: RowDecode, seed: int) -> SamplerOutput:
        return decode_once(model, vocabulary, policy, schedule, workload, seed, options.graphs)

    for policy in policies.values():  # warm-up
        decode(policy, short, options.seed)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    outputs: dict[str, SamplerOutput] = {}
    for run in range(options.runs or suite.runs):
        for name, policy in policies.items():
            outputs[name], spent = speed.timed(lambda: decode(policy, schedule, options.seed + run), device)  # noqa: B023
            seconds[name].append(spent)
    plain, on_cpu, shape = seconds["none"], device.type == "cpu", asdict(workload)
    shape |= {"grid": list(workload.grid or ()), "image": workload.image, "rule": "quota"}
    found = []
    for name, policy in policies.items():
        own, stats = seconds[name], outputs[name].stats
        bounds = [speedup_bound(policy, schedule, model.traits, rate) for rate in (None, lambda n: rates(n * rows))]
        row = TimedDecode(
            name,
            shape,
            outputs[name].nfe,
            median(own),
            own,
            median(a / b for a, b in zip(plain, own, strict=True)),
            bounds[0],
            bounds[1],
            policy.reference_bound(schedule, model.traits),
            outside_share=1 - stats.forward_seconds / own[-1] if on_cpu else None,
            peak_share=stats.flops / stats.forward_seconds / peak if on_cpu else None,
            stats=stats.to_dict(),
        )
        found.append(asdict(row))
    return {"rows": found, "matmul": about}


def decode_once(
    model: MaskedTransformer,
    vocabulary: Vocabulary,
    policy: RefreshPolicy,
    schedule: RowDecode,
    workload: RandomDecode,
    seed: int,
    graphs: bool,
) -> SamplerOutput:
    """The rows of a workload by a fixed quota, the most probable token each."""
    text, image = (
        ModalityDecoding(max(schedule.steps(m), 1), "quota", "fixed", temperature=0.0, block_length=schedule.block)
        for m in Modality
    )
    config = SamplerConfig(text, image, order="text_first", stop_at_eos=False)
    batch = request(schedule, workload.grid, vocabulary, workload.batch, seed).to(model.device)
    seeds = torch.arange(workload.batch) + seed
    return Sampler(model, vocabulary, config, policy, graphs=graphs)(batch, seeds)
