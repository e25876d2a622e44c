"""Caches on a trained pipeline: EmojiEval's quality on many cases, and the seconds of a few rows, measured apart.

Quality does not depend on how many rows are decoded together, so it is measured once for each way to decode, in large
batches. Seconds do, and are measured for every batch, all ways in turn on the same rows. What is finished is kept, so
that a run that was interrupted goes on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from unidiff.evaluation.benchmark.cells import (
    Cells,
    chosen_cache,
    kept_report,
    measure_quality,
    measure_seconds,
    model_hash,
)
from unidiff.evaluation.benchmark.compare import AUTO, Measured, Trial, contrasts
from unidiff.evaluation.benchmark.decode import Benchmark, Progress, Row, machine, thread_count, usable_device
from unidiff.evaluation.benchmark.rates import MatmulRates, measure_rates, row_counts
from unidiff.evaluation.benchmark.settings import QUALITY, USUAL, Decode, cases_per_part, decodes
from unidiff.evaluation.benchmark.suites import POLICIES
from unidiff.evaluation.report import Estimate
from unidiff.pipeline import UniDiffPipeline
from unidiff.schema import check_fields
from unidiff.worlds.emoji.judge import yardstick

PARTS = ("quality", "timing")


@dataclass(frozen=True)
class EmojiOptions:
    """How much to measure.

    Args:
        cells: folder of finished measurements.
        caches: compared with `none`: "auto", or names in `POLICIES`.
        tasks: some of `QUALITY`.
        settings: see `Setting.parse`; `SWEEP` of each task when empty.
        batches: rows per decode, for the timing.
        cases: least number of cases behind the quality of a task.
        quality_batch: rows per decode, for the quality.
        rows: timed in each run; at least the batch.
        runs: of the timing.
        parts: some of `PARTS`.
        threads: of the CPU; None leaves it as it is.
        device: where. seed: of cases and decodes.

    Raises:
        ValueError: an unknown name, or a number below 1.
    """

    cells: Path
    caches: tuple[str, ...] = (AUTO,)
    tasks: tuple[str, ...] = USUAL
    settings: tuple[str, ...] = ()
    batches: tuple[int, ...] = (1, 16)
    cases: int = 2000
    quality_batch: int = 64
    rows: int = 8
    runs: int = 5
    parts: tuple[str, ...] = PARTS
    threads: int | None = None
    device: str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self, "benchmark")
        known = {"caches": (*POLICIES, AUTO), "tasks": tuple(QUALITY), "parts": PARTS}
        words = {"caches": "policy", "tasks": "task", "parts": "part"}
        for name, allowed in known.items():
            if unknown := [value for value in getattr(self, name) if value not in allowed]:
                raise ValueError(f"unknown {words[name]} {unknown[0]!r}; expected some of {', '.join(allowed)}")
        for name in ("cases", "quality_batch", "rows", "runs"):
            if not 1 <= getattr(self, name) <= 10**7:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1 and at most 10,000,000")
        if not 0 <= self.seed <= 2**40:
            raise ValueError(f"seed is {self.seed}; expected a number from 0 to {2**40}")
        if not self.batches or min(self.batches) < 1:
            raise ValueError(f"batches are {list(self.batches)}; expected numbers of rows of at least 1")

    @property
    def policies(self) -> tuple[str, ...]:
        """Names, without a cache first."""
        return tuple(dict.fromkeys(("none", *self.caches)))


@dataclass(frozen=True)
class Run:
    """What every measurement of a run needs.

    Attributes:
        what: identifies the weights, their type and the seed. codes: the versions of the sampler's code that measured.
    """

    pipe: UniDiffPipeline
    options: EmojiOptions
    cells: Cells
    what: Mapping[str, Any]
    progress: Progress
    codes: set[str] = field(default_factory=set)


def run_emoji(pipe: UniDiffPipeline, options: EmojiOptions, progress: Progress = lambda what: None) -> Benchmark:
    """Every task in every way, without a cache and with those asked for: what is not kept in `options.cells` is measured.

    Args:
        pipe: trained on emoji scenes.
        progress: told what comes next.

    Returns:
        Rows, and the contrasts in `about`, where both parts are asked for; else no rows.

    Raises:
        ValueError: an unknown device, a setting that cannot be read, or pictures of another size.
    """
    device = usable_device(options.device)
    pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    cells = Cells(options.cells)
    groups: dict[tuple[str, int], list[Trial]] = {}
    with thread_count(options.threads):
        dtype = str(pipe.transformer.dtype).removeprefix("torch.")
        run = Run(pipe, options, cells, {"model": model_hash(pipe), "dtype": dtype, "seed": options.seed}, progress)
        here = machine(device)
        timed = replace(run, what={**run.what, "machine": here})
        for task in options.tasks:
            for batch in options.batches:
                groups[task, batch] = trials_of(pipe, task, batch, options)
        estimates: dict[tuple[Decode, str], Estimate] = {}
        if "quality" in options.parts:
            every = [trial for group in groups.values() for trial in group]
            estimates = qualities(run, every)
        measured: list[Measured] = []
        if "timing" in options.parts:
            for group in groups.values():
                runs = timings(timed, group)
                if estimates:
                    measured += [_measured(trial, runs, estimates[quality_key(trial)]) for trial in group]
        result = Benchmark("emoji", about={"model": dict(pipe.transformer.config), "what": "EmojiEval", **here})
        rates = {b: _rates(timed, b) for b in options.batches} if measured else {}
    result.rows = [_row(m, measured, rates[m.batch], dtype) for m in measured]
    asked = {name: value for name, value in asdict(options).items() if name not in ("cells", "device", "threads")}
    result.about |= {**asked, "dtype": dtype, "yardstick": yardstick(), "blocks": "all"}
    result.about["contrasts"] = [c.to_dict() for c in contrasts(measured)]
    if len(run.codes) > 1:
        result.about["mixed_code"] = len(run.codes)
        progress(f"measurements in {str(options.cells)!r} come from {len(run.codes)} versions of the sampler's code")
    return result


def trials_of(pipe: UniDiffPipeline, task: str, batch: int, options: EmojiOptions) -> list[Trial]:
    """The matrix of one task and batch."""
    found = []
    for decode in decodes(task, pipe.settings.sampler(task), options.settings):
        for policy in options.policies:
            if decode.is_reference and len(decode.settings) == 1 and policy != "none":
                continue  # it is there to be compared with, and takes as long as all others together
            if policy == AUTO:
                found.append(Trial(decode, policy, batch, *chosen_cache(pipe, decode, batch, options.seed)))
            else:
                found.append(Trial(decode, policy, batch, POLICIES[policy]))
    return found


def quality_key(trial: Trial) -> tuple[Decode, str]:
    """The same for trials that decode the same: the batch does not count, nor how the cache was asked for."""
    return trial.decode, json.dumps(trial.taken.to_dict(), sort_keys=True)


def qualities(run: Run, trials: Sequence[Trial]) -> dict[tuple[Decode, str], Estimate]:
    """Quality with outcomes by `quality_key`."""
    options = run.options
    found: dict[tuple[Decode, str], Estimate] = {}
    distinct = {quality_key(trial): trial for trial in trials}
    for number, (which, trial) in enumerate(distinct.items(), 1):
        decode, n = trial.decode, cases_per_part(trial.decode.task, options.cases)
        name = f"quality-{decode.task}-{decode.settings[0].name.replace('/', '_')}-{trial.cache_name}"
        key = {**run.what, "yardstick": yardstick(), "n": n, "task": decode.task}
        key |= {"sampler": decode.config.to_dict(), "cache": trial.taken.to_dict()}
        if run.what["dtype"] != "float32":  # only there a row does not depend on the others
            key["rows"] = options.quality_batch
        run.progress(f"{name} ({number} of {len(distinct)})")
        measure = partial(measure_quality, run.pipe, decode, trial.taken, options.seed, n, options.quality_batch)
        data = run.cells.measured(name, key, measure)
        found[which] = kept_report(data).intervals[QUALITY[decode.task]]
        run.codes.add(data["code"])
    return found


def timings(run: Run, trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """What `measure_seconds` found in every turn of the trials of one task and batch; each begins with another trial."""
    options = run.options
    task, batch = trials[0].decode.task, trials[0].batch
    rows = -(-max(options.rows, batch) // batch) * batch  # whole batches
    plain = {t.name: [t.decode.config.to_dict(), t.policy, t.taken.to_dict()] for t in trials}
    key = {**run.what, "task": task, "batch": batch, "rows": rows, "trials": plain}
    warm, found = False, []
    for number in range(options.runs):
        name, own = f"timing-{task}-{batch}-{number}", {**key, "run": number}
        data = run.cells.load(name, own)
        if data is None:
            run.progress(f"timing of {task}, {batch} rows at once, run {number + 1} of {options.runs}")
            first = number * len(trials) // options.runs
            turn = {t.name: (t.decode, t.asked) for t in (*trials[first:], *trials[:first])}
            if not warm:
                measure_seconds(run.pipe, turn, batch, batch, options.seed)
            warm, data = True, measure_seconds(run.pipe, turn, rows, batch, options.seed)
            run.cells.save(name, own, data)
        found.append(data["trials"])
        run.codes.add(data["code"])
    return found


def _measured(trial: Trial, runs: Sequence[Mapping[str, Any]], quality: Estimate) -> Measured:
    own = [run[trial.name] for run in runs]
    asked = {f.name: getattr(trial, f.name) for f in fields(trial)}
    return Measured(**asked, seconds=tuple(run["seconds"] for run in own), quality=quality, work=own[-1])


def _rates(run: Run, batch: int) -> MatmulRates:
    """How fast the model's matrix products are at the rows of such batches, for the corrected bound."""
    pipe = run.pipe
    length = pipe.settings.text_length + pipe.settings.grid[0] * pipe.settings.grid[1]
    counts = row_counts(length * batch, batch)
    measure = lambda: {"points": [list(p) for p in measure_rates(pipe.transformer, counts).points]}  # noqa: E731
    points = run.cells.measured(f"rates-{batch}", {**run.what, "rows": counts}, measure)["points"]
    return MatmulRates(tuple((int(n), float(rate)) for n, rate in points))


def _row(own: Measured, measured: Sequence[Measured], rates: MatmulRates, dtype: str) -> Row:
    """A line of the table, compared with the same decode without a cache."""
    plain = next(m for m in measured if m.group == own.group and m.policy == "none" and m.decode == own.decode)
    bound = plain.work["flops"] / own.work["flops"]
    setting = own.decode.settings[0]
    return Row(
        own.policy,
        {"task": own.decode.task, "setting": own.decode.name, "rule": setting.rule, "value": setting.value}
        | {"block": setting.block, "dtype": dtype, "batch": own.batch, "cache": own.cache_name},
        round(own.work["nfe"]),
        median(own.seconds),
        list(own.seconds),
        own.speedup_over(plain)[0],
        bound,
        bound * rates(_rows(own)) / rates(_rows(plain)),
        quality=own.quality.value,
        quality_low=own.quality.low,
        quality_high=own.quality.high,
        stats={**own.work, "sampler": own.decode.config.to_dict(), "cache": own.taken.to_dict(), "note": own.note},
    )


def _rows(own: Measured) -> int:
    """Mean number of rows in a matrix product: what the correction of a bound is for."""
    return max(1, round(own.work["tokens_per_pass"]))
