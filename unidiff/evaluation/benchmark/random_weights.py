"""Paired timings of decodes with and without caches, on random weights, beside what the caches could gain at most."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
from torch import nn

from unidiff.decoding import ModalityDecoding, RefreshPolicy, Sampler, SamplerConfig, SamplerOutput
from unidiff.decoding.cache.base import speedup_bound
from unidiff.decoding.cache.config import CACHES, CacheConfig
from unidiff.decoding.row_decode import RowDecode, TokenRun
from unidiff.evaluation.benchmark.measure import (
    Cells,
    code_hash,
    copy_bandwidth,
    machine,
    matmul_peak,
    measure_rates,
    measure_steps,
    row_counts,
    thread_count,
)
from unidiff.evaluation.benchmark.result import Benchmark, TimedDecode
from unidiff.models.transformer import MaskedTransformer
from unidiff.process import pick_device, timed
from unidiff.schema import Between, check_fields
from unidiff.tokens import Modality, Span, TokenBatch, Vocabulary

Count = Annotated[int, Between(1, 2**40)]
Progress = Callable[[str], None]


@dataclass(frozen=True)
class SuiteOptions:
    """How much of a suite to run.

    Args:
        only: policies to compare with `none`, shapes: text and image tokens of the rows, as `128+1024`; none for all.
        blocks: blocks to decode of each row, evenly spread; None for all.
        runs: paired runs, device: where; None for the suite's. threads: of the CPU; None leaves it as it is.
        seed: of weights, tokens and decodes. graphs: see `unidiff.decoding.graphs`; nothing on a CPU.
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
    """Run a suite. Raises `ValueError`: an unknown suite, policy or shape, or a device that is not there."""
    pick((name,), SUITES, "suite")
    suite = SUITES[name]
    for policy in options.only:
        cache_named(policy)
    pick(options.shapes, dict.fromkeys(w.shape for w in suite.workloads), "shape")
    device = pick_device(options.device or suite.device)
    with thread_count(options.threads):
        here, runs = machine(device), options.runs or suite.runs
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
    warm_up = workload.schedule(vocabulary, 1, min(workload.passes, 3))
    peak = matmul_peak(suite.peak_size, model.dtype, device)
    rates = measure_rates(model, row_counts(schedule.length * rows, schedule.block * rows))
    bandwidth = copy_bandwidth(suite.copy_bytes, device)
    hidden = request(schedule, workload.grid, vocabulary, rows, options.seed).to(device).hide_targets(vocabulary)
    about = {
        "workload": workload.describe(),
        "peak": peak,
        "bandwidth": bandwidth,
        "rates": {str(n): rate for n, rate in rates.points},
        "steps": measure_steps(model, hidden, schedule, peak, bandwidth),
    }
    names = dict.fromkeys(("none", *(options.only or suite.policies)))
    policies = {name: cache_named(name).build() for name in names}
    decode = partial(decode_once, model, vocabulary, workload, options.graphs)
    for policy in policies.values():
        decode(policy, warm_up, options.seed)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    outputs: dict[str, SamplerOutput] = {}
    for run in range(options.runs or suite.runs):
        for name, policy in policies.items():
            outputs[name], spent = timed(partial(decode, policy, schedule, options.seed + run), device)
            seconds[name].append(spent)
    plain, on_cpu, shape = seconds["none"], device.type == "cpu", asdict(workload)
    shape |= {"grid": list(workload.grid or ()), "image": workload.image, "rule": "quota"}
    found = []
    for name, policy in policies.items():
        own, stats = seconds[name], outputs[name].stats
        row = TimedDecode(
            *(name, shape, outputs[name].nfe, median(own), own),
            median(a / b for a, b in zip(plain, own, strict=True)),
            speedup_bound(policy, schedule, model.traits),
            speedup_bound(policy, schedule, model.traits, lambda n: rates(n * rows)),
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
    workload: RandomDecode,
    graphs: bool,
    policy: RefreshPolicy,
    schedule: RowDecode,
    seed: int,
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


UPSTREAM = "-upstream"
"""Behind a policy's name: it counts as the paper's reference implementation does."""
MAIN = ("none", "prefix", "dual", "adaptive", "max-logit")


def cache_named(name: str) -> CacheConfig:
    """A cache by a name of `--only`, with its default settings. Raises `ValueError`: no such name."""
    policy = name.removesuffix(UPSTREAM)
    pick((policy,), CACHES, "policy")
    return CacheConfig(policy, {"compat": "upstream"} if policy != name else {})


def pick(asked: Iterable[str], known: Iterable[str], what: str) -> None:
    """Raises `ValueError` for names that are not known."""
    if unknown := [name for name in asked if name not in set(known)]:
        raise ValueError(f"unknown {what} {unknown[0]!r}; expected some of {', '.join(known)}")


@dataclass(frozen=True)
class RandomDecode:
    """A decode with random tokens and a fixed quota.

    Args:
        text: text tokens. grid: image codes as (height, width), or None. block: tokens, passes: of each block.
        dtype: of the weights. batch: rows.
    """

    text: int
    grid: tuple[int, int] | None
    block: int
    passes: int
    dtype: str
    batch: int = 1

    @property
    def image(self) -> int:
        """Image tokens."""
        return 0 if self.grid is None else self.grid[0] * self.grid[1]

    @property
    def shape(self) -> str:
        """Text and image tokens, as `128+1024`."""
        return f"{self.text}+{self.image}"

    def describe(self) -> str:
        """One line."""
        return (
            f"{self.dtype}, {self.text} text + {self.image} image tokens, blocks of {self.block}, "
            f"{self.passes} passes each, {self.batch} row{'s' * (self.batch > 1)}"
        )

    def schedule(self, vocabulary: Vocabulary, blocks: int | None = None, passes: int | None = None) -> RowDecode:
        """Everything is decoded, or `blocks` blocks, evenly spread over the row, with the rest given."""
        chosen = spread(-(-self.text // self.block) - (-self.image // self.block), blocks)
        segments, number = list[TokenRun](), 0
        for modality, tokens, ids in (
            (Modality.TEXT, self.text, vocabulary.text_size),
            (Modality.IMAGE, self.image, vocabulary.image_size),
        ):
            for start in range(0, tokens, self.block):
                size, given = min(self.block, tokens - start), number not in chosen
                if segments and (segments[-1].modality, segments[-1].given) == (modality, given):
                    size += segments.pop().tokens  # neighbours that are alike become one
                segments.append(TokenRun(size, ids, modality, given))
                number += 1
        return RowDecode(tuple(segments), self.block, passes or self.passes)


@dataclass(frozen=True)
class ShapeSuite:
    """Random weights of a realistic shape, and what is decoded with them.

    Args:
        about: one line for people. model: arguments of `MaskedTransformer` besides `vocab_size`.
        text_ids, image_ids: sizes of the two slices of the vocabulary.
        policies: names of `cache_named`, compared with each other. runs: paired runs of each.
        peak_size: n of the n x n products that give the matmul peak.
        copy_bytes: what is copied to measure the bandwidth of the memory.
    """

    about: str
    model: Mapping[str, Any]
    text_ids: int
    image_ids: int
    workloads: tuple[RandomDecode, ...]
    policies: tuple[str, ...] = MAIN
    device: str = "cpu"
    runs: int = 3
    peak_size: int = 2048
    copy_bytes: int = 2**28

    @property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary.unified(self.text_ids, self.image_ids)


def _shapes(
    passes: tuple[int, ...], dtypes: tuple[str, ...], blocks: tuple[int, ...] = (64,), batches: tuple[int, ...] = (1,)
) -> tuple[RandomDecode, ...]:
    """128 text tokens with a 32 x 32 image, and 512 text tokens alone."""
    every = product(dtypes, ((128, (32, 32)), (512, None)), blocks, passes, batches)
    return tuple(RandomDecode(*row, block, n, dtype, batch) for dtype, row, block, n, batch in every)


_BOTH, _BF16 = ("float32", "bfloat16"), ("bfloat16",)
_UNIDISC = dict(qk_norm="head", activation="gelu_tanh", time_conditioning=True, sandwich_norm=True)
_LLADA = dict(num_heads=32, ffn_size=12288, rope="1d", modality_embedding=False)
_GPU: dict[str, Any] = dict(device="cuda", peak_size=8192)
SUITES: dict[str, ShapeSuite] = {
    "smoke": ShapeSuite(
        "seconds; shows that everything runs",
        dict(hidden_size=32, num_layers=2, num_heads=2),
        *(50, 40, (RandomDecode(8, (4, 4), 4, 2, "float32"), RandomDecode(8, None, 4, 4, "bfloat16", 2))),
        ("none", "prefix", "dual", "vicinity", "adaptive", "max-logit"),
        runs=2,
        peak_size=64,
        copy_bytes=2**20,
    ),
    "cpu-25m": ShapeSuite(
        "8 layers, d = 512, on a CPU",
        dict(hidden_size=512, num_layers=8, num_heads=8),
        *(8192, 8192, _shapes((8, 16, 64), _BOTH)),
    ),
    "unidisc-small": ShapeSuite(
        "12 layers, d = 768, as UniDisc small, on a CPU",
        dict(hidden_size=768, num_layers=12, num_heads=12, ffn_size=3072, **_UNIDISC),
        *(32000, 16384, _shapes((16,), _BOTH, (32, 64))),
    ),
    "gpu-1.4b": ShapeSuite(
        "24 layers, d = 2048, as UniDisc 1.4B",
        dict(hidden_size=2048, num_layers=24, num_heads=16, ffn_size=8192, **_UNIDISC),
        *(32000, 16384, _shapes((16, 64), _BF16, (32, 64), (1, 8))),
        runs=5,
        **_GPU,
    ),
    "gpu-8b": ShapeSuite(
        "32 layers, d = 4096, as LLaDA 8B and MMaDA",
        dict(hidden_size=4096, num_layers=32, **_LLADA),
        *(126349, 8192, _shapes((16, 64), _BF16, (32, 64), (1, 8))),
        **_GPU,
    ),
}


def spread(total: int, count: int | None) -> frozenset[int]:
    """`count` of the numbers 0 ... total - 1, evenly spread; all for None."""
    if count is None or count >= total:
        return frozenset(range(total))
    return frozenset(int((i + 0.5) * total / count) for i in range(count))
