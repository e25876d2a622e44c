"""Scores with intervals, and the report that holds them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from unidiff.errors import first_line, json_name, read_json
from unidiff.files import write_json
from unidiff.schema import check_value, from_data

Z95 = 1.959963984540054
ENTRIES = ("intervals", "outcomes", "about")  # keys of a report's JSON that are no numbers


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


@dataclass(frozen=True)
class JudgedCase:
    """One case as a person looks at it.

    Attributes:
        task, category, number: which it is; numbers count within a category.
        right: how it was judged.
        asked: what the model was given in words. wrote: its own words. seen: what a reader saw on what it drew.
        expected: words that would have been right, where these can be said.
        pictures: what was given or drawn, each with a word for it, uint8 `[H, W, 3]`.
        row: name of its row among the kept ones.
    """

    task: str
    category: str
    number: int
    right: bool
    asked: str = ""
    wrote: str = ""
    seen: str = ""
    expected: str = ""
    pictures: tuple[tuple[str, np.ndarray], ...] = field(default=(), compare=False, repr=False)
    row: str = ""


@dataclass(frozen=True)
class Measure:
    """How a number is shown.

    Attributes:
        task: whose number it is. words: its name for people. headline: it is the one that counts for the task.
        better: "higher", "lower", or "" for a number that is neither.
    """

    task: str
    words: str
    headline: bool = False
    better: str = "higher"


@dataclass
class EvaluationReport:
    """What an evaluation found.

    Attributes:
        values: plain numbers by key; a key with a dot is nested in the JSON (`categories.counting`).
        intervals: of those that have one, by the same keys.
        about: seed, profile, sizes, hashes: whatever identifies the run.
        cases: for people, with their pictures; not in the JSON. measures: how numbers are shown, by their keys.
    """

    values: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, Estimate] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    cases: list[JudgedCase] = field(default_factory=list, compare=False, repr=False)
    measures: dict[str, Measure] = field(default_factory=dict, compare=False, repr=False)

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
        table.add_column(head, justify="left" if number < left else "right", overflow="fold")  # nothing is cut off
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


def _written(cases: np.ndarray) -> str | list[float | None]:
    """Shares as a string of 0 and 1, means as numbers of float32 precision; None for what is not finite."""
    if cases.dtype == bool:
        return "".join("01"[c] for c in cases.tolist())
    return [_finite(float(f"{x:.7g}")) for x in cases.tolist()]


def _read(cases: Any) -> np.ndarray:
    """Inverse of `_written`. Raises ValueError for anything else."""
    if isinstance(cases, str):
        if set(cases) - {"0", "1"}:
            raise ValueError("outcomes of a share are written with 0 and 1 only")
        return np.array([c == "1" for c in cases], bool)
    check_value(cases, list[float | None], "outcomes of a mean")
    return np.array(cases, np.float64)
