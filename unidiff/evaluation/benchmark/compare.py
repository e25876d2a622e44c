"""What caches and fewer passes change, in quality and in time, apart and together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from rich.console import Group
from rich.table import Table

from unidiff.decoding import CacheConfig
from unidiff.evaluation.benchmark.decode import Benchmark
from unidiff.evaluation.benchmark.settings import Decode
from unidiff.evaluation.paired import paired_interval
from unidiff.evaluation.report import Estimate

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


@dataclass(frozen=True)
class Trial:
    """One way to decode a task with one cache, in batches of one size.

    Attributes:
        policy: the cache as it is asked for. taken: what that is for such a batch. note: why.
    """

    decode: Decode
    policy: str
    batch: int
    taken: CacheConfig
    note: str = ""

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


@dataclass(frozen=True, kw_only=True)
class Measured(Trial):
    """A trial and what came out.

    Attributes:
        seconds: per row, of each run; the runs of a task and batch are paired.
        quality: with the outcome of each case. work: of one run, see `measure_seconds`.
    """

    seconds: tuple[float, ...]
    quality: Estimate
    work: Mapping[str, Any]

    @property
    def group(self) -> tuple[str, int]:
        return self.decode.task, self.batch

    def speedup_over(self, other: Measured) -> tuple[float, float, float]:
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
    def of(cls, kind: str, before: Measured, after: Measured) -> Contrast:
        """Compare two of the same task and batch."""
        one, other = before.quality, after.quality
        low, high = paired_interval(one.cases, other.cases, key=before.decode.task)
        names = (before.name, after.name, after.cache_name)
        return cls(kind, *before.group, *names, *after.speedup_over(before), other.value - one.value, low, high)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able data."""
        return asdict(self)


def contrasts(measured: Sequence[Measured]) -> list[Contrast]:
    """All comparisons of every task and batch, in the order of `KINDS`."""
    found: list[Contrast] = []
    for group in dict.fromkeys(m.group for m in measured):
        found += _contrasts([m for m in measured if m.group == group])
    return found


def _contrasts(measured: Sequence[Measured]) -> Iterator[Contrast]:
    """Of one task and batch."""
    for own in measured:
        if own.policy != "none":
            yield Contrast.of("cache", _only(measured, "none", own.decode), own)
    references = {m.policy: m for m in measured if m.decode.is_reference}
    slowest = {policy: max(runs, key=_seconds) for policy, runs in _by_policy(measured).items()}
    for own in measured:
        if own is not slowest[own.policy]:
            yield Contrast.of("passes", slowest[own.policy], own)
    best = max(measured, key=lambda m: m.quality.value)
    plain = fastest(measured, "none", best.quality.value - LOSS)
    if plain is not None and "none" in references:
        yield Contrast.of("plain", references["none"], plain)
    for policy in dict.fromkeys(m.policy for m in measured if m.policy != "none"):
        own_fastest = fastest(measured, policy, best.quality.value - LOSS)
        if own_fastest is None:
            continue
        yield Contrast.of("loss", best, own_fastest)
        if plain is not None:
            yield Contrast.of("equal", plain, own_fastest)
        as_good = fastest(measured, "none", own_fastest.quality.value)
        if as_good is not None:
            yield Contrast.of("as good", as_good, own_fastest)
        if "none" in references:
            yield Contrast.of("reference", references["none"], own_fastest)


def fastest(measured: Sequence[Measured], policy: str, least: float) -> Measured | None:
    """The fastest with a cache whose quality is at least so much; None where there is none."""
    good = [m for m in measured if m.policy == policy and m.quality.value >= least]
    return min(good, key=_seconds) if good else None


def _seconds(own: Measured) -> float:
    return median(own.seconds)


def _by_policy(measured: Sequence[Measured]) -> dict[str, list[Measured]]:
    found: dict[str, list[Measured]] = {}
    for own in measured:
        found.setdefault(own.policy, []).append(own)
    return found


def _only(measured: Sequence[Measured], policy: str, decode: Decode) -> Measured:
    return next(m for m in measured if m.policy == policy and m.decode == decode)


def contrast_tables(benchmark: Benchmark) -> Group:
    """For people: per task and batch the ways to decode and what each gains, then what is gained in the end."""
    found = benchmark.about["contrasts"]
    parts: list[Table | str] = []
    for task, batch in dict.fromkeys((r.workload["task"], r.workload["batch"]) for r in benchmark.rows):
        title = f"{task}, {batch} row{'s' * (batch > 1)} at once, {benchmark.about['dtype']}"
        heads = ("cache", "taken", "setting", "nfe", "s per row", "quality", "95 % interval")
        table = _table(title, *heads, "cache: speed-up", "points", "passes: speed-up", "points")
        for row in benchmark.rows:
            if (row.workload["task"], row.workload["batch"]) != (task, batch):
                continue
            name = f"{row.policy}, {row.workload['setting']}"
            own = {c["kind"]: c for c in found if (c["task"], c["batch"], c["after"]) == (task, batch, name)}
            table.add_row(
                row.policy,
                row.workload["cache"],
                row.workload["setting"],
                str(row.nfe),
                f"{row.seconds:.3g}",
                f"{row.quality:.3f}",
                f"{row.quality_low:.3f} to {row.quality_high:.3f}",
                *_gain(own.get("cache")),
                *_gain(own.get("passes")),
            )
        parts.append(table)
    last = _table("together", "task", "rows", "what", "from", "to", "taken", "speed-up", "runs", "points")
    for c in found:
        if c["kind"] not in ("cache", "passes"):
            runs = f"{c['speedup_low']:.2f} to {c['speedup_high']:.2f}"
            cells = (c["task"], str(c["batch"]), KINDS[c["kind"]], c["before"], c["after"], c["cache"])
            last.add_row(*cells, _gain(c)[0], runs, _gain(c)[1])
    return Group(f"{benchmark.suite}: {benchmark.about['what']}, {benchmark.about['cases']} cases", *parts, last)


def _table(title: str, *heads: str) -> Table:
    table = Table(title=title, title_justify="left")
    for head in heads:
        table.add_column(head)
    return table


def _gain(contrast: Mapping[str, Any] | None) -> tuple[str, str]:
    if contrast is None:
        return "", ""
    points, low, high = (100 * contrast[name] for name in ("difference", "low", "high"))
    return f"{contrast['speedup']:.2f}", f"{points:+.1f} ({low:+.1f} to {high:+.1f})"
