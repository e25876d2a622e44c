"""Scores with intervals, the report that holds them, and what changed between two reports of the same cases."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from unidiff.errors import first_line, json_name, read_json
from unidiff.files import write_json
from unidiff.schema import check_value, from_data

Z95 = 1.959963984540054
ENTRIES = ("intervals", "outcomes", "about")  # keys of a report's JSON that are no numbers
RESAMPLES = 10_000
SAME = ("yardstick", "profile", "seed", "n", "per_task")
"""What two evaluations must have in common: then their cases are the same."""
_CHUNK = 1 << 21  # draws held at once
_FEW = 8  # different values up to which counts are drawn in place of cases: the same law, faster


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval and the number of cases behind it.

    Attributes:
        value: the mean over `cases` of the mean of each, where these are known.
        cases: what came out of every case, one array for each part that counts alike: bool `[n]` for a share, float64
            `[n]` for a mean. Empty where that is not known.
    """

    value: float
    low: float
    high: float
    n: int
    cases: tuple[np.ndarray, ...] = field(default=(), compare=False, repr=False)

    @classmethod
    def share(cls, right: Iterable[bool]) -> Estimate:
        """Share of right cases with Wilson's interval (Wilson 1927)."""
        values = [bool(r) for r in right]
        n = len(values)
        if n == 0:
            raise ValueError("a share needs at least one case")
        p = sum(values) / n
        centre = (p + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
        half = Z95 / (1 + Z95**2 / n) * math.sqrt(p * (1 - p) / n + Z95**2 / (4 * n * n))
        low, high = 0.0 if p == 0 else centre - half, 1.0 if p == 1 else centre + half  # exactly, not up to rounding
        return cls(p, low, high, n, (np.array(values),))

    @classmethod
    def mean(cls, values: Sequence[float] | np.ndarray) -> Estimate:
        """Mean with the normal interval from the spread of the values; infinite for a single one."""
        x = np.asarray(values, np.float64)
        if x.size == 0:
            raise ValueError("a mean needs at least one value")
        half = Z95 * float(x.std(ddof=1)) / math.sqrt(x.size) if x.size > 1 else math.inf
        return cls(float(x.mean()), float(x.mean()) - half, float(x.mean()) + half, int(x.size), (x.ravel(),))

    @classmethod
    def average(cls, parts: Sequence[Estimate]) -> Estimate:
        """Plain mean of independent estimates; the half-widths add in squares."""
        value = sum(p.value for p in parts) / len(parts)
        low = math.sqrt(sum((p.value - p.low) ** 2 for p in parts)) / len(parts)
        high = math.sqrt(sum((p.high - p.value) ** 2 for p in parts)) / len(parts)
        known = all(len(p.cases) == 1 for p in parts)  # an average of averages would need weights
        cases = tuple(p.cases[0] for p in parts) if known else ()
        return cls(value, value - low, value + high, sum(p.n for p in parts), cases)


@dataclass
class EvaluationReport:
    """What an evaluation found.

    Attributes:
        values: plain numbers by key; a key with a dot is nested in the JSON (`categories.counting`).
        intervals: of those that have one, by the same keys.
        about: seed, profile, sizes, hashes: whatever identifies the run.
    """

    values: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, Estimate] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)

    def add(self, key: str, value: Estimate | float) -> None:
        """Note a number, with its interval if it has one."""
        if isinstance(value, Estimate):
            self.intervals[key], value = value, value.value
        self.values[key] = float(value)

    def to_dict(self, outcomes: bool = False) -> dict[str, Any]:
        """Nested JSON-able data; numbers that are not finite become None.

        Args:
            outcomes: also what came out of every case, as strings of 0 and 1 or lists of numbers; see `compare_reports`.
        """
        data: dict[str, Any] = {}
        for key, value in self.values.items():
            *path, last = key.split(".")
            node = data
            for part in path:
                node = node.setdefault(part, {})
            node[last] = _finite(value)
        ends = {key: {"low": _finite(e.low), "high": _finite(e.high), "n": e.n} for key, e in self.intervals.items()}
        data["intervals"] = ends
        if outcomes:
            known = {key: e.cases for key, e in self.intervals.items() if e.cases}
            data["outcomes"] = {key: [_written(part) for part in parts] for key, parts in known.items()}
        return {**data, "about": self.about}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> EvaluationReport:
        """Inverse of `to_dict`; None becomes NaN. Raises `ValueError`: data that is no report."""
        try:
            if not isinstance(data, Mapping):
                raise ValueError(f"it is {json_name(data)}")
            saved = from_data(_Saved, {name: data[name] for name in ENTRIES if name in data}, "the report:")
            numbers = {key: part for key, part in data.items() if key not in ENTRIES}
            report = cls(dict(_flat(numbers)), about=dict(saved.about))
            for key, entry in saved.intervals.items():
                if key not in report.values:
                    raise ValueError(f"it has an interval of {key!r} and no number")
                low, high = (math.nan if end is None else float(end) for end in (entry.low, entry.high))
                cases = tuple(map(_read, saved.outcomes.get(key, ())))
                if cases and sum(map(len, cases)) != entry.n:
                    raise ValueError(f"{key!r} has {entry.n} cases and outcomes of {sum(map(len, cases))}")
                report.intervals[key] = Estimate(report.values[key], low, high, entry.n, cases)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"this is no report of an evaluation ({first_line(error)})") from error
        return report

    def save(self, path: str | Path, outcomes: bool = False) -> None:
        """Write JSON (see `to_dict`); the file appears complete or not at all."""
        write_json(path, self.to_dict(outcomes))

    @classmethod
    def load(cls, path: str | Path) -> EvaluationReport:
        """Read what `save` wrote. Raises `FileNotFoundError`: no such file. `ValueError`: a file that is no report."""
        data = read_json(path, "an evaluation", object)
        try:
            return cls.from_dict(data)
        except ValueError as error:
            raise ValueError(f"{str(path)!r} cannot be read as an evaluation: {error}") from error

    def table(self, title: str = "evaluation") -> Table:
        """A rich table: one line per number."""
        table = table_of(title, "measure", "value", "95 % interval", "cases")
        for key, value in self.values.items():
            interval = self.intervals.get(key)
            cells = (f"{interval.low:.3f} to {interval.high:.3f}", str(interval.n)) if interval else ("", "")
            table.add_row(key, f"{value:.3f}", *cells)
        return table


def table_of(title: str, *heads: str, left: int = 1) -> Table:
    """A rich table without rows; the first `left` columns are words, the others numbers."""
    table = Table(title=title, title_justify="left")
    for number, head in enumerate(heads):
        table.add_column(head, justify="left" if number < left else "right")
    return table


def sources_hash(paths: Sequence[Path]) -> str:
    """SHA-256 over names and contents of files."""
    digest = hashlib.sha256()
    for path in paths:
        content = path.read_bytes()
        digest.update(f"{path.name}|{len(content)}|".encode())
        digest.update(content)
    return digest.hexdigest()


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


@dataclass(frozen=True)
class _Interval:
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True)
class _Saved:
    """What a report's file holds besides its numbers."""

    intervals: dict[str, _Interval]
    about: dict[str, Any]
    outcomes: dict[str, list[Any]] = field(default_factory=dict)


def _flat(node: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, float]]:
    """Numbers of nested data by dotted keys. Raises ValueError for other values."""
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{key}.")
        else:
            check_value(value, float | None, before + key)
            yield before + key, math.nan if value is None else float(value)


def _written(cases: np.ndarray) -> str | list[float]:
    """Shares as a string of 0 and 1, means as numbers of float32 precision."""
    if cases.dtype == bool:
        return "".join("01"[c] for c in cases.tolist())
    return [float(f"{x:.7g}") for x in cases.tolist()]


def _read(cases: Any) -> np.ndarray:
    """Inverse of `_written`. Raises ValueError for anything else."""
    if isinstance(cases, str):
        if set(cases) - {"0", "1"}:
            raise ValueError("outcomes of a share are written with 0 and 1 only")
        return np.array([c == "1" for c in cases], bool)
    check_value(cases, list[float], "outcomes of a mean")
    return np.array(cases, np.float64)


@dataclass(frozen=True)
class ScoreDifference:
    """A number before and after, and after - before; its 95 % interval and the cases behind it where these are known."""

    before: float
    after: float
    difference: float
    low: float | None = None
    high: float | None = None
    n: int = 0


@dataclass(frozen=True)
class Comparison:
    """What two evaluations of the same cases differ in: by key, and what the cases and the intervals are."""

    differences: Mapping[str, ScoreDifference]
    about: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able data, keys as in the reports with their dots; numbers that are not finite become None."""
        rows = {key: asdict(d) for key, d in self.differences.items()}
        finite = {k: {name: None if v != v else v for name, v in row.items()} for k, row in rows.items()}
        return {"differences": finite, "about": dict(self.about)}

    def save(self, path: str | Path) -> None:
        """Write JSON; the file appears complete or not at all."""
        write_json(path, self.to_dict())

    def table(self, title: str = "after - before") -> Table:
        """A rich table: one line per number; a difference whose interval does not hold 0 has a star."""
        table = table_of(title, "measure", "before", "after", "difference", "95 % interval", "cases")
        for key, d in self.differences.items():
            cells = ("", "")
            if d.low is not None and d.high is not None:
                star = " *" if d.low > 0 or d.high < 0 else ""
                cells = (f"{d.low:+.3f} to {d.high:+.3f}{star}", str(d.n))
            table.add_row(key, f"{d.before:.3f}", f"{d.after:.3f}", f"{d.difference:+.3f}", *cells)
        return table


def compare_reports(
    before: EvaluationReport, after: EvaluationReport, resamples: int = RESAMPLES, seed: int = 0
) -> Comparison:
    """The difference of every number that two reports share, with intervals where both know the outcome of each case.

    Args:
        before, after: of the same yardstick, profile, seed and number of cases; from memory, or saved with outcomes.
        resamples: of the bootstrap. seed: of its draws; every key has draws of its own.

    Raises:
        ValueError: different cases, reports without outcomes or without a number in common, or resamples below 1.
    """
    if not 1 <= resamples <= 10**7:
        raise ValueError(f"resamples is {resamples}; expected at least 1 and at most 10,000,000")
    for name in SAME:
        one, other = (report.about.get(name) for report in (before, after))
        if one != other:
            raise ValueError(
                f"the evaluations differ in {name} ({one!r} and {other!r}), so their cases cannot be paired; "
                "evaluate both with the same"
            )
    shared = [key for key in before.values if key in after.values]
    if not shared:
        raise ValueError("the evaluations have no number in common; evaluate the same tasks")
    for report, which in ((before, "first"), (after, "second")):
        if not any(e.cases for e in report.intervals.values()):
            raise ValueError(f"the {which} evaluation was saved without the outcome of each case; save it with them")
    differences = {}
    for key in shared:
        a, b = before.values[key], after.values[key]
        one, other = (report.intervals.get(key) for report in (before, after))
        interval: tuple[Any, ...] = ()
        if one is not None and other is not None and one.cases and other.cases:
            interval = (*paired_interval(one.cases, other.cases, resamples, seed, key), one.n)
        differences[key] = ScoreDifference(a, b, b - a, *interval)
    about = {name: before.about.get(name) for name in SAME}
    return Comparison(differences, {**about, "resamples": resamples, "bootstrap_seed": seed})


def paired_interval(
    before: Sequence[np.ndarray], after: Sequence[np.ndarray], resamples: int = RESAMPLES, seed: int = 0, key: str = ""
) -> tuple[float, float]:
    """95 % interval of the mean over parts of the mean difference, by a paired bootstrap (Efron and Tibshirani 1993).

    Case by case both had the same prompt, picture and seed, so the difference of each case is resampled (within its
    part), not the two scores apart: what is hard for both cancels.

    Args:
        before, after: bool or float `[n_p]` for each part p, case by case; see `Estimate.cases`.
        seed, key: of the draws.

    Raises:
        ValueError: no parts, or parts of different sizes.
    """
    sizes = [[len(p) for p in parts] for parts in (before, after)]
    if not before or sizes[0] != sizes[1]:
        one, other = (" + ".join(map(str, own)) or "no" for own in sizes)
        raise ValueError(
            f"{key or 'a number'} has {one} cases in one evaluation and {other} in the other; evaluate the same cases"
        )
    rng = np.random.default_rng([seed, *key.encode()])
    total = np.zeros(resamples)  # [R]
    for old, new in zip(before, after, strict=True):
        total += _resampled_means(new.astype(np.float64) - old.astype(np.float64), resamples, rng)
    low, high = np.quantile(total / len(before), (0.025, 0.975))
    return float(low), float(high)


def _resampled_means(x: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Means of `resamples` samples of x `[n]` drawn with replacement, float64 `[R]`."""
    values, counts = np.unique(x, return_counts=True)
    if len(values) <= _FEW:  # how often each value is drawn has a multinomial law
        return rng.multinomial(len(x), counts / len(x), size=resamples) @ values / len(x)
    step = max(1, _CHUNK // len(x))
    starts = range(0, resamples, step)
    return np.concatenate([x[rng.integers(len(x), size=(min(step, resamples - s), len(x)))].mean(1) for s in starts])
