"""What caches and fewer passes change, in quality and in time, apart and together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from rich.console import Group
from rich.table import Table

from unidiff.decoding import CacheConfig
from unidiff.evaluation.benchmark.result import Benchmark
from unidiff.evaluation.benchmark.settings import Decode
from unidiff.evaluation.paired import paired_interval
from unidiff.evaluation.report import Estimate, table_of

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
