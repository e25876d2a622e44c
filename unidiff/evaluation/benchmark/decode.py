"""Paired timings of decodes with and without caches, beside what the caches could gain at most."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from unidiff.decoding import ModalityDecoding, RefreshPolicy, Sampler, SamplerConfig, SamplerOutput
from unidiff.decoding.cache.bounds import Schedule, reference_bound, speedup_bound
from unidiff.evaluation.benchmark.cells import Cells, code_hash
from unidiff.evaluation.benchmark.rates import (
    MatmulRates,
    matmul_peak,
    measure_rates,
    row_counts,
    synchronise,
)
from unidiff.evaluation.benchmark.steps import copy_bandwidth, measure_steps
from unidiff.evaluation.benchmark.suites import POLICIES, SUITES, Suite, Workload
from unidiff.models.transformer import MaskedTransformer
from unidiff.schema import check_fields
from unidiff.tokens import Modality, Span, TokenBatch, Vocabulary
from unidiff.train.build import pick_device

Progress = Callable[[str], None]


@dataclass
class Row:
    """One policy in one decode.

    Attributes:
        policy: by its name in `POLICIES`.
        workload: what was decoded: text, image, block, passes per block, rule, dtype, rows.
        nfe: network evaluations of a row.
        seconds: median over the runs. seconds_all: each of them.
        speedup: median over the runs of seconds without a cache over seconds with it.
        bound: the largest possible speed-up, by FLOPs. bound_corrected: by FLOPs over the rate of matrix products at the
            number of rows. bound_reference: the papers' closed formula. None where unknown.
        fraction_of_bound: speedup / bound_corrected.
        quality: share of right answers, where the model has been trained; quality_low, quality_high: 95 % interval.
        outside_share: time spent outside forward passes and head (CPU only).
        peak_share: rate of the forward passes over the matmul peak (CPU only).
        stats: of one decode.
    """

    policy: str
    workload: dict[str, Any]
    nfe: int
    seconds: float
    seconds_all: list[float]
    speedup: float
    bound: float | None = None
    bound_corrected: float | None = None
    bound_reference: float | None = None
    quality: float | None = None
    quality_low: float | None = None
    quality_high: float | None = None
    outside_share: float | None = None
    peak_share: float | None = None
    stats: dict[str, Any] = field(default_factory=dict)

    @property
    def fraction_of_bound(self) -> float | None:
        return None if self.bound_corrected is None else self.speedup / self.bound_corrected

    def to_dict(self) -> dict[str, Any]:
        """Plain data, the workload spread over the keys."""
        data = asdict(self)
        workload = data.pop("workload")
        return {"policy": data.pop("policy"), **workload, **data, "fraction_of_bound": self.fraction_of_bound}


@dataclass
class Benchmark:
    """What a suite measured: `rows`, and in `about` the machine, the rates and how much of the suite was run."""

    suite: str
    rows: list[Row] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able data."""
        return {"suite": self.suite, "about": self.about, "rows": [row.to_dict() for row in self.rows]}


@dataclass(frozen=True)
class Options:
    """How much of a suite to run.

    Args:
        only: policies to compare with `none`; all of the suite's when empty.
        blocks: blocks to decode of each row, evenly spread; None for all.
        runs: paired runs; None for the suite's number.
        threads: of the CPU; None leaves it as it is.
        device: another device than the suite's.
        seed: of weights, tokens and decodes.
        graphs: record passes as CUDA graphs and replay them, see `unidiff.decoding.graphs`; nothing on a CPU.
        shapes: tokens of the rows to decode, as `128+1024` for text and image; all of the suite's when empty.
        cells: folder in which finished workloads are kept, so that a run that was interrupted goes on; None for none.
    """

    only: tuple[str, ...] = ()
    blocks: int | None = None
    runs: int | None = None
    threads: int | None = None
    device: str | None = None
    seed: int = 0
    graphs: bool = False
    shapes: tuple[str, ...] = ()
    cells: Path | None = None

    def __post_init__(self) -> None:
        check_fields(self, "benchmark")
        for name, least in {"blocks": 1, "runs": 1, "seed": 0}.items():
            if (value := getattr(self, name)) is not None and not least <= value <= 2**40:
                raise ValueError(f"{name} is {value}; expected at least {least}")

    def policies(self, default: tuple[str, ...]) -> list[str]:
        """Names to run, without a cache first.

        Raises:
            ValueError: an unknown name.
        """
        if unknown := [name for name in self.only if name not in POLICIES]:
            raise ValueError(f"unknown policy {unknown[0]!r}; expected some of {', '.join(POLICIES)}")
        return list(dict.fromkeys(("none", *(self.only or default))))

    def workloads(self, suite: Suite) -> list[Workload]:
        """Those to run.

        Raises:
            ValueError: a shape that the suite does not have.
        """
        shapes = dict.fromkeys(workload.shape for workload in suite.workloads)
        if unknown := [name for name in self.shapes if name not in shapes]:
            raise ValueError(f"unknown shape {unknown[0]!r}; expected some of {', '.join(shapes)}")
        return [workload for workload in suite.workloads if not self.shapes or workload.shape in self.shapes]


def run_suite(name: str, options: Options, progress: Progress = lambda what: None) -> Benchmark:
    """Run a suite of random-weight models.

    Raises:
        ValueError: an unknown suite, policy or shape, or a device that is not there.
    """
    if name not in list(SUITES):
        raise ValueError(f"unknown suite {name!r}; expected one of {', '.join(SUITES)}")
    suite = SUITES[name]
    workloads = options.workloads(suite)
    device = usable_device(options.device or suite.device)
    with thread_count(options.threads):
        here = machine(device)
        own = {k: dict(v) if k == "model" else v for k, v in vars(suite).items() if k not in ("workloads", "about")}
        result = Benchmark(name, about={"model": dict(suite.model), "what": suite.about, **here})
        result.about["blocks"] = "all" if options.blocks is None else options.blocks
        result.about["runs"] = options.runs or suite.runs
        result.about["graphs"] = options.graphs
        result.about["matmul"] = []
        model = random_model(suite, device, options.seed)
        kept = {name: value for name, value in asdict(options).items() if name != "shapes"}
        asked = {**kept, "cells": None, "threads": torch.get_num_threads(), "runs": result.about["runs"]}
        for workload in workloads:
            progress(describe(workload))
            nn.Module.to(model, getattr(torch, workload.dtype))  # without diffusers' advice on loading
            key = {"suite": own, "workload": asdict(workload), "options": asked, "code": code_hash(), "machine": here}
            found = _kept(options.cells, workload, key, lambda: _run_workload(suite, workload, model, options))  # noqa: B023
            result.rows += [Row(**row) for row in found["rows"]]
            result.about["matmul"].append(found["matmul"])
    return result


def _kept(
    folder: Path | None, workload: Workload, key: Mapping[str, Any], measure: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """What was measured before, else now."""
    if folder is None:
        return measure()
    name = f"{workload.shape}-{workload.dtype}-{workload.block}x{workload.passes}-{workload.batch}"
    return Cells(folder).measured(name, key, measure)


def random_model(suite: Suite, device: torch.device, seed: int) -> MaskedTransformer:
    """Weights that let every position differ. (A fresh model's branches are silent, so all of them would tie.)"""
    torch.manual_seed(seed)
    with device:
        model = MaskedTransformer(suite.vocabulary.size, **suite.model).eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
    return model


def request(
    schedule: Schedule, grid: tuple[int, int] | None, vocabulary: Vocabulary, rows: int, seed: int
) -> TokenBatch:
    """Rows of random tokens, with the segments of a schedule to be decoded."""
    generator = torch.Generator().manual_seed(seed)
    spans = []
    for modality in Modality:
        own = [s for s in schedule.segments if s.modality == modality]
        if not own:
            continue
        start, stop = vocabulary.range_of(modality)
        given = torch.cat([torch.full((s.tokens,), s.given) for s in own])
        ids = torch.randint(start, stop, given.shape, generator=generator)
        if modality == Modality.TEXT:
            spans.append(Span.text(ids, given))
        else:
            assert grid is not None
            spans.append(Span.image(ids.view(grid), given.view(grid)))
    return TokenBatch.from_spans([spans] * rows)


def _run_workload(suite: Suite, workload: Workload, model: MaskedTransformer, options: Options) -> dict[str, Any]:
    """All policies of one decode, run after run in turn: `rows` (fields of `Row`) and `matmul`, the rates beside them."""
    vocabulary, device = suite.vocabulary, model.device
    schedule = workload.schedule(vocabulary, options.blocks)
    short = workload.schedule(vocabulary, 1, min(workload.passes, 3))
    peak = matmul_peak(suite.peak_size, model.dtype, device)
    rates = measure_rates(model, row_counts(schedule.length * workload.batch, schedule.block * workload.batch))
    bandwidth = copy_bandwidth(suite.copy_bytes, device)
    batch = request(schedule, workload.grid, vocabulary, workload.batch, options.seed).to(device)
    about = {
        "workload": describe(workload),
        "peak": peak,
        "bandwidth": bandwidth,
        "rates": {str(n): rate for n, rate in rates.points},
        "steps": measure_steps(model, batch.hide_targets(vocabulary), schedule, peak, bandwidth),
    }
    names = options.policies(suite.policies)
    policies = {name: POLICIES[name].build() for name in names}
    for policy in policies.values():  # warm-up
        _decode(model, vocabulary, policy, short, workload, options.seed, options.graphs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    outputs: dict[str, SamplerOutput] = {}
    for run in range(options.runs or suite.runs):
        for name, policy in policies.items():
            synchronise(device)
            begun = time.perf_counter()
            outputs[name] = _decode(model, vocabulary, policy, schedule, workload, options.seed + run, options.graphs)
            synchronise(device)
            seconds[name].append(time.perf_counter() - begun)
    rows = [
        _row(name, policies[name], outputs[name], seconds, workload, schedule, model, rates, peak) for name in names
    ]
    return {"rows": [asdict(row) for row in rows], "matmul": about}


def _decode(
    model: MaskedTransformer,
    vocabulary: Vocabulary,
    policy: RefreshPolicy,
    schedule: Schedule,
    workload: Workload,
    seed: int,
    graphs: bool,
) -> SamplerOutput:
    text, image = (
        ModalityDecoding(max(schedule.steps(m), 1), "quota", "fixed", temperature=0.0, block_length=schedule.block)
        for m in Modality
    )
    config = SamplerConfig(text, image, order="text_first", stop_at_eos=False)
    batch = request(schedule, workload.grid, vocabulary, workload.batch, seed).to(model.device)
    seeds = torch.arange(workload.batch) + seed
    return Sampler(model, vocabulary, config, policy, graphs=graphs)(batch, seeds)


def _row(
    name: str,
    policy: RefreshPolicy,
    out: SamplerOutput,
    seconds: dict[str, list[float]],
    workload: Workload,
    schedule: Schedule,
    model: MaskedTransformer,
    rates: MatmulRates,
    peak: float,
) -> Row:
    own, stats = seconds[name], out.stats
    on_cpu = model.device.type == "cpu"
    return Row(
        name,
        {**asdict(workload), "grid": list(workload.grid or ()), "image": workload.image, "rule": "quota"},
        out.nfe,
        median(own),
        own,
        median(plain / cached for plain, cached in zip(seconds["none"], own, strict=True)),
        speedup_bound(policy, schedule, model.traits),
        speedup_bound(policy, schedule, model.traits, lambda rows: rates(rows * workload.batch)),
        reference_bound(policy, schedule, model.traits),
        outside_share=1 - stats.forward_seconds / own[-1] if on_cpu else None,
        peak_share=stats.flops / stats.forward_seconds / peak if on_cpu else None,
        stats=stats.to_dict(),
    )


def describe(workload: Workload) -> str:
    """One line."""
    return (
        f"{workload.dtype}, {workload.text} text + {workload.image} image tokens, blocks of {workload.block}, "
        f"{workload.passes} passes each, {workload.batch} row{'s' * (workload.batch > 1)}"
    )


def usable_device(name: str) -> torch.device:
    """The device of this name.

    Raises:
        ValueError: it is not there.
    """
    try:
        return pick_device(name)
    except ValueError as error:
        raise ValueError(
            f"this suite runs on {name!r}, which is not there; name another device, for instance cpu"
        ) from error


def machine(device: torch.device) -> dict[str, Any]:
    """What the numbers depend on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "torch": torch.__version__,
        "device": name,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


@contextmanager
def thread_count(count: int | None) -> Iterator[None]:
    """Torch's number of CPU threads inside the block; None leaves it alone.

    Raises:
        ValueError: fewer than one.
    """
    if count is not None and not 1 <= count <= 1024:
        raise ValueError(f"threads is {count}; expected at least 1 and at most 1024")
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
