"""Scores with intervals, and the report: flat JSON numbers, their 95 % intervals, hashes of the yardstick, a table."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from unidiff.files import replacing

Z95 = 1.959963984540054


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval and the number of cases behind it."""

    value: float
    low: float
    high: float
    n: int

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
        low, high = (
            (0.0 if p == 0 else centre - half),
            (1.0 if p == 1 else centre + half),
        )  # exactly, not up to rounding
        return cls(p, low, high, n)

    @classmethod
    def mean(cls, values: Sequence[float] | np.ndarray) -> Estimate:
        """Mean with the normal interval from the spread of the values; infinite for a single one."""
        x = np.asarray(values, np.float64)
        if x.size == 0:
            raise ValueError("a mean needs at least one value")
        half = Z95 * float(x.std(ddof=1)) / math.sqrt(x.size) if x.size > 1 else math.inf
        return cls(float(x.mean()), float(x.mean()) - half, float(x.mean()) + half, int(x.size))

    @classmethod
    def average(cls, parts: Sequence[Estimate]) -> Estimate:
        """Plain mean of independent estimates; the half-widths add in squares."""
        value = sum(p.value for p in parts) / len(parts)
        low = math.sqrt(sum((p.value - p.low) ** 2 for p in parts)) / len(parts)
        high = math.sqrt(sum((p.high - p.value) ** 2 for p in parts)) / len(parts)
        return cls(value, value - low, value + high, sum(p.n for p in parts))


@dataclass
class Report:
    """What an evaluation found.

    Attributes:
        values: plain numbers by key; a key with a dot is nested in the JSON (`categories.counting`).
        intervals: low, high and n of those that have one, by the same keys.
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

    def to_dict(self) -> dict[str, Any]:
        """Nested JSON-able data; numbers that are not finite become None."""
        data: dict[str, Any] = {}
        for key, value in self.values.items():
            *path, last = key.split(".")
            node = data
            for part in path:
                node = node.setdefault(part, {})
            node[last] = _finite(value)
        data["intervals"] = {
            key: {"low": _finite(e.low), "high": _finite(e.high), "n": e.n} for key, e in self.intervals.items()
        }
        return {**data, "about": self.about}

    def save(self, path: str | Path) -> None:
        """Write JSON; the file appears complete or not at all."""
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")

    def table(self, title: str = "EmojiEval", labels: Mapping[str, str] | None = None) -> Table:
        """A rich table: one line per number."""
        table = Table(title=title)
        for heading in ("measure", "value", "95 % interval", "cases"):
            table.add_column(heading, justify="left" if heading == "measure" else "right")
        for key, value in self.values.items():
            interval = self.intervals.get(key)
            cells = (f"{interval.low:.3f} to {interval.high:.3f}", str(interval.n)) if interval else ("", "")
            table.add_row((labels or {}).get(key, key), f"{value:.3f}", *cells)
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
