"""How the tasks of a trained model are decoded in a benchmark, and what a world adds: who judges, and on which cases."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

from rich.console import Group
from rich.table import Table

from unidiff.decoding import CacheConfig, SamplerConfig
from unidiff.evaluation.benchmark.result import Benchmark
from unidiff.evaluation.paired import paired_interval
from unidiff.evaluation.report import Estimate, EvaluationReport, table_of
from unidiff.pipelines.options import DecodeOptions

TARGETS = {
    "text_to_image": ("image",),
    "caption": ("text",),
    "answer": ("text",),
    "inpaint": ("text", "image"),
    "generate": ("text", "image"),
}
"""Modalities that a task decodes."""
RULES = ("model", "passes", "threshold", "factor")
REFERENCE = "passes-64"
"""As good as one token per pass: a rule commits at least one, and no row has more than 64 tokens to decode."""


@dataclass(frozen=True)
class JudgedTasks:
    """What a world gives to the benchmark.

    Attributes:
        quality: tasks, and which number of the report is their quality.
        usual: tasks measured where none are asked for.
        sweep: names of the settings of each task where none are asked for, see `Setting.parse`.
        judge: (pipe, task, at least so many cases, seed, rows per decode, options) -> the report of one task.
        decode: (pipe, task, rows, seed, rows per decode, on_output, options) decodes some of these cases.
        yardstick: () -> a hash of all that the qualities depend on besides the model.
    """

    quality: Mapping[str, str]
    usual: tuple[str, ...]
    sweep: Mapping[str, tuple[str, ...]]
    judge: Callable[..., EvaluationReport]
    decode: Callable[..., None]
    yardstick: Callable[[], str]


@dataclass(frozen=True)
class Setting:
    """How the targets of a task are decoded; everything else is as the pipeline's own settings for the task say.

    Args:
        rule: `model`: the pipeline's settings; `passes`: a quota; `threshold`, `factor`: as `ModalityDecoding.rule`, for
            the text where the task decodes any.
        value: number of passes, threshold or factor; none for `model`.
        block: tokens per block; None leaves that as it is.
    """

    rule: str = "model"
    value: float | None = None
    block: int | None = None

    def __post_init__(self) -> None:
        value, what = self.value, f"a setting with rule {self.rule!r}"
        if self.rule not in RULES:
            raise ValueError(f"the rule of a setting is {self.rule!r}; expected one of {', '.join(RULES)}")
        if (value is None) != (self.rule == "model"):
            raise ValueError(f"{what} has the value {value}; write for instance passes-16")
        if value is not None and not 0 <= value <= 2**20:
            raise ValueError(f"{what} has the value {value}; expected a number from 0 to {2**20}")
        if self.rule == "passes" and value != int(value or 0):
            raise ValueError(f"{what} has the value {value}; expected a whole number")
        if self.block is not None and not 1 <= self.block <= 2**20:
            raise ValueError(f"a setting has blocks of {self.block}; expected at least 1")

    @classmethod
    def parse(cls, name: str) -> Setting:
        """`model`, `passes-16`, `threshold-0.9`, `factor-1`; with `/16` behind it in blocks of 16.

        Raises:
            ValueError: another name.
        """
        head, _, block = name.partition("/")
        rule, _, value = head.partition("-")
        try:
            return cls(rule, float(value) if value else None, int(block) if block else None)
        except ValueError as error:
            raise ValueError(f"setting {name!r} cannot be read ({error})") from error

    @property
    def name(self) -> str:
        """What `parse` reads."""
        value = "" if self.value is None else f"-{self.value:g}"
        return f"{self.rule}{value}" + ("" if self.block is None else f"/{self.block}")

    def config(self, config: SamplerConfig, task: str) -> SamplerConfig:
        """A task's sampler with this setting for what the task decodes."""
        targets, value = TARGETS[task], self.value
        asked: dict[str, Any] = {}
        if self.rule == "passes":
            asked["steps"] = int(value or 0)
        elif self.rule == "threshold":
            asked["threshold"] = {targets[0]: value}
        if self.block is not None:
            asked["block_length"] = dict.fromkeys(targets, self.block)
        changed = DecodeOptions(**asked).apply(config)
        found = {modality: getattr(changed, modality) for modality in targets}
        if value is not None and self.rule == "factor":
            found[targets[0]] = replace(found[targets[0]], rule="factor", factor=value)
        return replace(config, **found)


@dataclass(frozen=True)
class Decode:
    """One way to decode a task: the sampler, and all settings that mean it."""

    task: str
    settings: tuple[Setting, ...]
    config: SamplerConfig

    @property
    def name(self) -> str:
        """The settings' names, `a = b` where several are the same."""
        return " = ".join(dict.fromkeys(s.name for s in self.settings))

    @property
    def is_reference(self) -> bool:
        return any(s.name == REFERENCE for s in self.settings)


def decodes(task: str, config: SamplerConfig, names: Sequence[str]) -> list[Decode]:
    """The settings of these names, those that come to the same decode together; `ValueError` as `Setting.parse`."""
    found: dict[SamplerConfig, tuple[Setting, ...]] = {}
    for setting in map(Setting.parse, names):
        own = setting.config(config, task)
        found[own] = (*found.get(own, ()), setting)
    return [Decode(task, settings, own) for own, settings in found.items()]


AUTO = "auto"
LOSS = 0.01
"""Loss of quality, against the best of a task, that a faster decode may have."""
KINDS = {
    "cache": "the same passes, cache on against off",
    "passes": "the same cache, fewer passes",
    "loss": "fastest within 1 point of the best, against the best",
    "equal": "fastest with the cache against fastest without, both within 1 point of the best",
    "as good": "fastest with the cache against fastest without that is at least as good",
    "reference": "fastest with the cache, within 1 point of the best, against 64 passes without",
    "plain": "fastest without a cache, within 1 point of the best, against 64 passes",
}
_UNKNOWN = Estimate(0.0, 0.0, 0.0, 0)


@dataclass(frozen=True)
class Trial:
    """One way to decode a task with one cache, in batches of one size, and what came out once it was measured.

    Attributes:
        policy: the cache as it is asked for. taken: what that is for such a batch. note: why.
        seconds: per row, of each run; the runs of a task and batch are paired.
        quality: with the outcome of each case. work: of one run, see `measure_seconds`.
    """

    decode: Decode
    policy: str
    batch: int
    taken: CacheConfig
    note: str = ""
    seconds: tuple[float, ...] = ()
    quality: Estimate = _UNKNOWN
    work: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Within a task and batch."""
        return f"{self.policy}, {self.decode.name}"

    @property
    def cache_name(self) -> str:
        """What is taken, in a word."""
        return "segments" if self.taken.segments else self.taken.policy

    @property
    def asked(self) -> str | CacheConfig:
        """What the timed calls are given."""
        return AUTO if self.policy == AUTO else self.taken

    @property
    def group(self) -> tuple[str, int]:
        return self.decode.task, self.batch

    def speedup_over(self, other: Trial) -> tuple[float, float, float]:
        """Seconds of the other over one's own: median, least and greatest of the runs."""
        ratios = [a / b for a, b in zip(other.seconds, self.seconds, strict=True)]
        return median(ratios), min(ratios), max(ratios)


@dataclass(frozen=True)
class Contrast:
    """Two ways to decode the same cases.

    Attributes:
        kind: one of `KINDS`. before, after: names of the two. cache: what was taken in `after`.
        speedup: seconds before over seconds after, median of paired runs; speedup_low, speedup_high: least and greatest.
        difference: quality after - before; low, high: its 95 % paired bootstrap interval.
    """

    kind: str
    task: str
    batch: int
    before: str
    after: str
    cache: str
    speedup: float
    speedup_low: float
    speedup_high: float
    difference: float
    low: float
    high: float

    @classmethod
    def of(cls, kind: str, before: Trial, after: Trial) -> Contrast:
        """Compare two of the same task and batch."""
        one, other = before.quality, after.quality
        interval = paired_interval(one.cases, other.cases, key=before.decode.task)
        names = (before.name, after.name, after.cache_name)
        return cls(kind, *before.group, *names, *after.speedup_over(before), other.value - one.value, *interval)


def contrasts(measured: Sequence[Trial]) -> list[Contrast]:
    """All comparisons of every task and batch, in the order of `KINDS`."""
    groups = [[m for m in measured if m.group == group] for group in dict.fromkeys(m.group for m in measured)]
    return [Contrast.of(*found) for group in groups for found in _contrasts(group)]


def _contrasts(measured: Sequence[Trial]) -> Iterator[tuple[str, Trial, Trial]]:
    """Kind, before and after, of one task and batch."""
    policies = {m.policy: [own for own in measured if own.policy == m.policy] for m in measured}
    for own in measured:
        if own.policy != "none":
            yield "cache", next(m for m in policies["none"] if m.decode == own.decode), own
    for runs in policies.values():
        slowest = max(runs, key=_seconds)
        yield from (("passes", slowest, own) for own in runs if own is not slowest)
    reference = next((m for m in policies.get("none", ()) if m.decode.is_reference), None)
    best = max(measured, key=lambda m: m.quality.value)
    plain = fastest(measured, "none", best.quality.value - LOSS)
    if plain is not None and reference is not None:
        yield "plain", reference, plain
    for policy in (name for name in policies if name != "none"):
        own_fastest = fastest(measured, policy, best.quality.value - LOSS)
        if own_fastest is not None:
            as_good = fastest(measured, "none", own_fastest.quality.value)
            pairs = {"loss": best, "equal": plain, "as good": as_good, "reference": reference}
            yield from ((kind, before, own_fastest) for kind, before in pairs.items() if before is not None)


def fastest(measured: Sequence[Trial], policy: str, least: float) -> Trial | None:
    """The fastest with a cache whose quality is at least so much; None where there is none."""
    good = [m for m in measured if m.policy == policy and m.quality.value >= least]
    return min(good, key=_seconds) if good else None


def _seconds(own: Trial) -> float:
    return median(own.seconds)


def contrast_tables(benchmark: Benchmark) -> Group:
    """For people: per task and batch the ways to decode and what each gains, then what is gained in the end."""
    found, parts = benchmark.about["contrasts"], dict[str, Table]()
    heads = ("cache", "taken", "setting", "nfe", "s per row", "quality", "95 % interval")
    gains = {(c["task"], c["batch"], c["after"], c["kind"]): c for c in found}
    for row in benchmark.rows:
        task, batch, setting, cache = (row.workload[name] for name in ("task", "batch", "setting", "cache"))
        title = f"{task}, {batch} row{'s' * (batch > 1)} at once, {benchmark.about['dtype']}"
        if title not in parts:
            parts[title] = table_of(title, *heads, "cache: speed-up", "points", "passes: speed-up", "points", left=99)
        own = [gains.get((task, batch, f"{row.policy}, {setting}", kind)) for kind in ("cache", "passes")]
        numbers = (str(row.nfe), f"{row.seconds:.3g}", f"{row.quality:.3f}")
        interval = f"{row.quality_low:.3f} to {row.quality_high:.3f}"
        parts[title].add_row(row.policy, cache, setting, *numbers, interval, *_gain(own[0]), *_gain(own[1]))
    last = table_of("together", *("task", "rows", "what", "from", "to", "taken", "speed-up", "runs", "points"), left=99)
    for c in found:
        if c["kind"] not in ("cache", "passes"):
            runs, (speedup, points) = f"{c['speedup_low']:.2f} to {c['speedup_high']:.2f}", _gain(c)
            names = (c["task"], str(c["batch"]), KINDS[c["kind"]], c["before"], c["after"], c["cache"])
            last.add_row(*names, speedup, runs, points)
    head = f"{benchmark.suite}: {benchmark.about['what']}, {benchmark.about['cases']} cases"
    return Group(head, *parts.values(), last)


def _gain(contrast: Mapping[str, Any] | None) -> tuple[str, str]:
    if contrast is None:
        return "", ""
    points, low, high = (100 * contrast[name] for name in ("difference", "low", "high"))
    return f"{contrast['speedup']:.2f}", f"{points:+.1f} ({low:+.1f} to {high:+.1f})"
