"""What changed between two evaluations of the same cases, with paired bootstrap intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from unidiff.evaluation.report import EvaluationReport, table_of
from unidiff.files import write_json

RESAMPLES = 10_000
SAME = ("suite", "yardstick", "profile", "seed", "n", "per_task")
"""What two evaluations must have in common: then their cases are the same."""
_CHUNK = 1 << 21  # draws held at once
_FEW = 8  # different values up to which counts are drawn in place of cases: the same law, faster


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
        finite = {
            k: {name: None if v is None or not math.isfinite(v) else v for name, v in row.items()}
            for k, row in rows.items()
        }
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
        if one != other and not (name == "suite" and None in (one, other)):  # reports of older versions do not name it
            raise ValueError(
                f"the evaluations differ in {name} ({one!r} and {other!r}), so their cases cannot be paired; "
                "evaluate both with the same"
            )
    shared = [key for key in before.values if key in after.values]
    if not shared:
        raise ValueError("the evaluations have no number in common; evaluate the same tasks")
    for report, which in ((before, "first"), (after, "second")):
        if not any(e.cases for e in report.intervals.values()):
            raise ValueError(
                f"the {which} evaluation was saved without the outcome of each case; save it with them (--outcomes), where its "
                "metric scores case by case (bleu, fid, kid and is do not)"
            )
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
