"""Caches on a trained pipeline: a world's quality on many cases, and the seconds of a few rows, measured apart.

Quality does not depend on how many rows are decoded together, so it is measured once for each way to decode. Seconds do,
and are measured for every batch, all ways in turn on the same rows. An interrupted run goes on with what is kept.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Annotated, Any

from unidiff.decoding import CacheConfig
from unidiff.evaluation.benchmark.measure import (
    Cells,
    MatmulRates,
    code_hash,
    machine,
    measure_rates,
    model_hash,
    row_counts,
    thread_count,
)
from unidiff.evaluation.benchmark.random_weights import Progress, cache_named, pick
from unidiff.evaluation.benchmark.result import Benchmark, TimedDecode
from unidiff.evaluation.benchmark.trials import AUTO, Decode, JudgedTasks, Trial, contrasts, decodes
from unidiff.evaluation.report import EvaluationReport
from unidiff.pipeline import UniDiffPipeline
from unidiff.pipelines.output import UniDiffOutput
from unidiff.process import pick_device
from unidiff.schema import Between, check_fields

PARTS = ("quality", "timing")
Count = Annotated[int, Between(1, 10**7)]


@dataclass(frozen=True)
class TrainedOptions:
    """How much to measure.

    Args:
        cells: folder of finished measurements. parts: some of `PARTS`.
        caches: compared with `none`: "auto", or names of `cache_named`.
        tasks: some of the world's; those it measures usually when empty.
        settings: see `Setting.parse`; the world's of each task when empty.
        cases: least number behind the quality of a task. quality_batch: rows per decode, for the quality.
        batches: rows per decode, for the timing. rows: timed in each of `runs`; at least the batch.
        threads: of the CPU; None leaves it as it is. device: where. seed: of cases and decodes.
    """

    cells: Path
    caches: tuple[str, ...] = (AUTO,)
    tasks: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    batches: tuple[Count, ...] = (1, 16)
    cases: Count = 2000
    quality_batch: Count = 64
    rows: Count = 8
    runs: Count = 5
    parts: tuple[str, ...] = PARTS
    threads: Annotated[int, Between(1, 1024)] | None = None
    device: str = "cpu"
    seed: Annotated[int, Between(0, 2**40)] = 0

    def __post_init__(self) -> None:
        check_fields(self, "benchmark")
        for name in self.caches:
            if name != AUTO:
                cache_named(name)
        pick(self.parts, PARTS, "part")
        if not self.batches:
            raise ValueError("batches are []; expected numbers of rows of at least 1")


@dataclass(frozen=True)
class TrainedRun:
    """What every measurement of a run needs.

    Attributes:
        what: identifies the weights, their type and the seed. here: the machine.
        codes: the versions of the sampler's code that measured.
    """

    pipe: UniDiffPipeline
    judged: JudgedTasks
    options: TrainedOptions
    progress: Progress
    what: Mapping[str, Any]
    here: Mapping[str, Any]
    codes: set[str] = field(default_factory=set)

    def kept(self, name: str, key: Mapping[str, Any], measure: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """A measurement of this run: what is kept, else what `measure` finds."""
        found = Cells(self.options.cells).measured(name, {**self.what, **key}, measure)
        self.codes.update([found["code"]] if "code" in found else ())
        return found


def run_trained(
    world: str,
    judged: JudgedTasks,
    pipe: UniDiffPipeline,
    options: TrainedOptions,
    progress: Progress = lambda what: None,
) -> Benchmark:
    """Every task in every way, without a cache and with those asked for: what is not kept in `options.cells` is measured.

    Args:
        world: its name. judged: its tasks. pipe: trained on its scenes. progress: told what comes next.

    Returns:
        Rows, and the contrasts in `about`, where both parts are asked for; else no rows.

    Raises:
        ValueError: an unknown task or device, a setting that cannot be read, or pictures of another size.
    """
    pick(options.tasks, judged.quality, "task")
    device, dtype = pick_device(options.device), str(pipe.transformer.dtype).removeprefix("torch.")
    pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    with thread_count(options.threads):
        what = {"model": model_hash(pipe), "dtype": dtype, "seed": options.seed}
        run = TrainedRun(pipe, judged, options, progress, what, machine(device))
        tasks = options.tasks or judged.usual
        groups = [trials_of(run, task, batch) for task in tasks for batch in options.batches]
        if "quality" in options.parts:
            groups = qualities(run, groups)
        if "timing" in options.parts:
            groups = [timings(run, group) for group in groups]
        measured = [trial for group in groups for trial in group if set(options.parts) == set(PARTS)]
        rates = {batch: _rates(run, batch) for batch in options.batches} if measured else {}
    asked = {name: value for name, value in asdict(options).items() if name not in ("cells", "device", "threads")}
    about = {"model": dict(pipe.transformer.config), "what": f"quality on {world} scenes", **run.here, **asked}
    about |= {"tasks": tasks, "dtype": dtype, "yardstick": judged.yardstick(), "blocks": "all"}
    about["contrasts"] = [asdict(c) for c in contrasts(measured)]
    if len(run.codes) > 1:
        about["mixed_code"] = len(run.codes)
        progress(f"measurements in {str(options.cells)!r} come from {len(run.codes)} versions of the sampler's code")
    return Benchmark(world, [_row(m, measured, rates[m.batch], dtype) for m in measured], about)


def trials_of(run: TrainedRun, task: str, batch: int) -> list[Trial]:
    """The matrix of one task and batch, without a cache first."""
    found, options = [], run.options
    for decode in decodes(task, run.pipe.settings.sampler(task), options.settings or run.judged.sweep[task]):
        for policy in dict.fromkeys(("none", *options.caches)):
            if decode.is_reference and len(decode.settings) == 1 and policy != "none":
                continue  # it is there to be compared with, and takes as long as all others together
            if policy == AUTO:  # one pass tells what it takes for so many rows
                out = decoded(run, decode, AUTO, batch, batch, callback_on_step_end=lambda *state: False)[0]
                assert out.cache is not None
                found.append(Trial(decode, policy, batch, out.cache, out.cache_note))
            else:
                found.append(Trial(decode, policy, batch, cache_named(policy)))
    return found


def decoded(
    run: TrainedRun, decode: Decode, cache: str | CacheConfig, rows: int, batch: int, **options: Any
) -> list[UniDiffOutput]:
    """What comes out of the decodes of some rows of a task; each row is decoded once."""
    found: list[UniDiffOutput] = []
    how = {"sampler": decode.config, "num_candidates": 1, "cache": cache, **options}
    run.judged.decode(run.pipe, decode.task, rows, run.options.seed, batch, found.append, **how)
    return found


def qualities(run: TrainedRun, groups: Sequence[Sequence[Trial]]) -> list[list[Trial]]:
    """The trials with their quality; those that decode the same share it, whatever the batch and how a cache was asked for.

    In float32 a quality does not depend on the rows that are decoded together.
    """
    options, judged, found = run.options, run.judged, {}
    which = lambda t: (t.decode, json.dumps(t.taken.to_dict(), sort_keys=True))  # noqa: E731
    distinct = {which(trial): trial for group in groups for trial in group}
    for number, trial in enumerate(distinct.values(), 1):
        decode = trial.decode
        name = f"quality-{decode.task}-{decode.settings[0].name.replace('/', '_')}-{trial.cache_name}"
        key = {"yardstick": judged.yardstick(), "cases": options.cases, "task": decode.task}
        key |= {"sampler": decode.config.to_dict(), "cache": trial.taken.to_dict()}
        key |= {} if run.what["dtype"] == "float32" else {"rows": options.quality_batch}
        run.progress(f"{name} ({number} of {len(distinct)})")
        kept = run.kept(name, key, lambda: measure_quality(run, trial))  # noqa: B023
        found[which(trial)] = EvaluationReport.from_dict(kept["report"]).intervals[judged.quality[decode.task]]
    return [[replace(trial, quality=found[which(trial)]) for trial in group] for group in groups]


def measure_quality(run: TrainedRun, trial: Trial) -> dict[str, Any]:
    """The report of one task, with outcomes."""
    options, decode = run.options, trial.decode
    how = {"sampler": decode.config, "num_candidates": 1, "cache": trial.taken}
    report = run.judged.judge(run.pipe, decode.task, options.cases, options.seed, options.quality_batch, **how)
    return {"report": report.to_dict(outcomes=True), "code": code_hash()}


def timings(run: TrainedRun, trials: Sequence[Trial]) -> list[Trial]:
    """The trials of one task and batch with their seconds of all runs; each run begins with another trial."""
    options, (task, batch) = run.options, trials[0].group
    rows = -(-max(options.rows, batch) // batch) * batch  # whole batches
    plain = {t.name: [t.decode.config.to_dict(), t.policy, t.taken.to_dict()] for t in trials}
    key = {"machine": run.here, "task": task, "batch": batch, "rows": rows, "trials": plain}
    warm, found = False, []

    def measure(number: int) -> dict[str, Any]:
        nonlocal warm
        run.progress(f"timing of {task}, {batch} rows at once, run {number + 1} of {options.runs}")
        first = number * len(trials) // options.runs
        turn = [*trials[first:], *trials[:first]]
        if not warm:
            measure_seconds(run, turn, batch)
        warm = True
        return measure_seconds(run, turn, rows)

    for number in range(options.runs):
        name = f"timing-{task}-{batch}-{number}"
        found.append(run.kept(name, {**key, "run": number}, lambda: measure(number))["trials"])  # noqa: B023
    seconds = {t.name: tuple(own[t.name]["seconds"] for own in found) for t in trials}
    return [replace(t, seconds=seconds[t.name], work=found[-1][t.name]) for t in trials]


def measure_seconds(run: TrainedRun, trials: Sequence[Trial], rows: int) -> dict[str, Any]:
    """Seconds per row of every trial on the same rows: from the tokens of a request to those of its result."""
    found = {}
    for trial in trials:
        outs = decoded(run, trial.decode, trial.asked, rows, trial.batch)
        count, stats = sum(len(out.texts) for out in outs), [out.stats for out in outs]
        full, partial = (sum(getattr(s, f"{kind}_passes") for s in stats) for kind in ("full", "partial"))
        tokens, layers = sum(s.query_tokens for s in stats), run.pipe.transformer.config.num_layers
        found[trial.name] = {
            "seconds": sum(out.seconds for out in outs) / count,
            "nfe": sum(out.nfe * len(out.texts) for out in outs) / count,
            "flops": sum(s.flops for s in stats) / count,
            "full_passes": full,
            "partial_passes": partial,
            "tokens_per_pass": tokens / layers / max(full + partial, 1),
        }
    return {"trials": found, "code": code_hash()}


def _rates(run: TrainedRun, batch: int) -> MatmulRates:
    """How fast the model's matrix products are at the rows of such batches, for the corrected bound."""
    settings = run.pipe.settings
    counts = row_counts((settings.text_length + settings.grid[0] * settings.grid[1]) * batch, batch)
    measure = lambda: {"points": measure_rates(run.pipe.transformer, counts).points}  # noqa: E731
    points = run.kept(f"rates-{batch}", {"machine": run.here, "rows": counts}, measure)["points"]
    return MatmulRates(tuple((int(n), float(rate)) for n, rate in points))


def _row(own: Trial, measured: Sequence[Trial], rates: MatmulRates, dtype: str) -> TimedDecode:
    """A line of the table, compared with the same decode without a cache."""
    plain = next(m for m in measured if m.group == own.group and m.policy == "none" and m.decode == own.decode)
    bound, setting = plain.work["flops"] / own.work["flops"], own.decode.settings[0]
    fast, slow = (rates(max(1, round(m.work["tokens_per_pass"]))) for m in (own, plain))  # by mean rows of a product
    return TimedDecode(
        own.policy,
        {"task": own.decode.task, "setting": own.decode.name, "rule": setting.rule, "value": setting.value}
        | {"block": setting.block, "dtype": dtype, "batch": own.batch, "cache": own.cache_name},
        *(round(own.work["nfe"]), median(own.seconds), list(own.seconds), own.speedup_over(plain)[0]),
        *(bound, bound * fast / slow),
        quality=own.quality.value,
        quality_low=own.quality.low,
        quality_high=own.quality.high,
        stats={**own.work, "sampler": own.decode.config.to_dict(), "cache": own.taken.to_dict(), "note": own.note},
    )
