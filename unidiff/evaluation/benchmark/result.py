"""A benchmark for people and for programs: table, JSON, CSV, and a plot of speed against quality or against the bound."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Group
from rich.table import Table

from unidiff.charts import chart_picture
from unidiff.evaluation.report import table_of
from unidiff.files import check_writable, replacing, write_json
from unidiff.pipelines.sheet import save_image

ENDINGS = (".json", ".csv", ".png")
Point = tuple[float, float]


@dataclass
class TimedDecode:
    """One policy in one decode.

    Attributes:
        policy: by its name, see `cache_named`.
        workload: what was decoded: text, image, block, passes per block, rule, dtype, rows.
        nfe: network evaluations of a row.
        seconds: median over the runs. seconds_all: each of them.
        speedup: median over the runs of seconds without a cache over seconds with it.
        bound: the largest possible speed-up, by FLOPs. bound_corrected: by FLOPs over the rate of matrix products at the
            number of rows. bound_reference: the papers' closed formula. None where unknown.
        fraction_of_bound: speedup / bound_corrected.
        quality: share of right answers, where the model has been trained; quality_low, quality_high: 95 % interval.
        outside_share: time spent outside forward passes and head (CPU only).
        peak_share: rate of the forward passes over the matmul peak (CPU only).
        stats: of one decode.
    """

    policy: str
    workload: dict[str, Any]
    nfe: int
    seconds: float
    seconds_all: list[float]
    speedup: float
    bound: float | None = None
    bound_corrected: float | None = None
    bound_reference: float | None = None
    quality: float | None = None
    quality_low: float | None = None
    quality_high: float | None = None
    outside_share: float | None = None
    peak_share: float | None = None
    stats: dict[str, Any] = field(default_factory=dict)

    @property
    def fraction_of_bound(self) -> float | None:
        return None if self.bound_corrected is None else self.speedup / self.bound_corrected

    def to_dict(self) -> dict[str, Any]:
        """Plain data, the workload spread over the keys."""
        data = asdict(self)
        workload = data.pop("workload")
        return {"policy": data.pop("policy"), **workload, **data, "fraction_of_bound": self.fraction_of_bound}


@dataclass
class Benchmark:
    """What a suite measured: `rows`, and in `about` the machine, the rates and how much of the suite was run."""

    suite: str
    rows: list[TimedDecode] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able data."""
        return {"suite": self.suite, "about": self.about, "rows": [row.to_dict() for row in self.rows]}


COLUMNS = {
    "nfe": ("nfe", "d"),
    "seconds": ("seconds", ".3g"),
    "speed-up": ("speedup", ".2f"),
    "bound": ("bound", ".2f"),
    "corrected": ("bound_corrected", ".2f"),
    "share": ("fraction_of_bound", ".0%"),
    "outside": ("outside_share", ".1%"),
    "of peak": ("peak_share", ".0%"),
    "quality": ("quality", ".3f"),
}
"""Columns of the table of random weights, with their attributes and formats."""


def tables(benchmark: Benchmark) -> Group:
    """One table per decode with a line per policy, under a heading; passes beside the roofline below."""
    blocks = benchmark.about.get("blocks", "all")
    title = f"{benchmark.suite}: {benchmark.about.get('what', '')}"
    parts: dict[str, Table] = {}
    for row in benchmark.rows:
        if label(row) not in parts:
            parts[label(row)] = table_of(label(row), "policy", *COLUMNS)
        values = [(getattr(row, name), form) for name, form in COLUMNS.values()]
        parts[label(row)].add_row(row.policy, *("" if value is None else format(value, form) for value, form in values))
    said = "{}: a full pass {:.3g} ms, {:.0%} of the roofline, a cached one {:.3g} ms, {:.0%}"
    steps = []
    for measured in benchmark.about.get("matmul", []):
        numbers = [(step["seconds"] * 1e3, step["share"]) for step in measured["steps"].values()]
        steps.append(said.format(measured["workload"], *(value for pair in numbers for value in pair)))
    title += "" if blocks == "all" else f" (only {blocks} blocks of each row)"
    return Group(title, *parts.values(), *steps)


def label(row: TimedDecode) -> str:
    """A decode in a few words."""
    w = row.workload
    block = "" if w["block"] is None else f" block {w['block']}"
    passes = "" if w["passes"] is None else f" x {w['passes']}"
    rows = "" if w["batch"] == 1 else f", {w['batch']} rows"
    return f"{w['text']}+{w['image']} {w['dtype']}, {w['rule']}{block}{passes}{rows}"


def write(benchmark: Benchmark, path: Path) -> list[Path]:
    """`path` (.json), and beside it the same rows as .csv and a plot as .png; each appears complete or not at all."""
    check_path(path)
    data, files = benchmark.to_dict(), [path.with_suffix(ending) for ending in ENDINGS]
    write_json(path, data)
    rows = [{k: v for k, v in row.items() if k not in ("stats", "seconds_all")} for row in data["rows"]]
    with replacing(files[1]) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)
    save_image(plot(benchmark), files[2])
    return files


def check_path(path: Path) -> None:
    """Before any work: raise `ValueError` or `OSError` where `write` will not be able to."""
    if path.suffix != ".json":
        raise ValueError(f"output {str(path)!r} must end in .json")
    for ending in ENDINGS:
        check_writable(path.with_suffix(ending))


def plot(benchmark: Benchmark) -> Image.Image:
    """Speed-up over the corrected bound; where there is a quality, that over seconds, a panel for every task and batch."""
    panels: dict[str, dict[str, list[Point]]] = {}
    names, whole = ("corrected bound", "measured speed-up"), f"{benchmark.suite}: speed-up and its bound"
    for row in benchmark.rows:
        title, point = whole, (row.bound_corrected or 0.0, row.speedup)
        if row.quality is not None:
            batch, names = row.workload["batch"], ("seconds per row", "share of right answers")
            title, point = f"{row.workload['task']}, {batch} row{'s' * (batch > 1)}", (row.seconds, row.quality)
        elif row.policy == "none" or not row.bound_corrected:
            continue
        panels.setdefault(title, {}).setdefault(row.policy, []).append(point)
    return draw_panels(panels or {whole: {}}, *names)


def draw_panels(panels: Mapping[str, Mapping[str, Sequence[Point]]], x_name: str, y_name: str) -> Image.Image:
    """A panel for every title, two in a line: points (x, y) by series, joined from left to right, on a logarithmic x axis.

    Points that are not finite are left out.

    Raises:
        ValueError: an x that is not positive.
    """
    for least in (x for series in panels.values() for points in series.values() for x, _ in points if x <= 0):
        raise ValueError(f"the x axis is logarithmic, but the smallest x is {least}")
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)

    def draw(grid: Any) -> None:
        axes = [grid] if len(panels) == 1 else list(grid.flat)
        for own in axes[len(panels) :]:
            own.set_axis_off()
        for own, (title, series) in zip(axes, panels.items(), strict=False):
            own.set(title=title, xlabel=x_name, ylabel=y_name, xscale="log")
            own.grid(alpha=0.3)
            own.xaxis.set_major_formatter("{x:g}")
            own.xaxis.set_minor_formatter("{x:g}")
            for name, points in series.items():
                kept = sorted(point for point in points if all(map(math.isfinite, point)))
                own.plot([x for x, _ in kept], [y for _, y in kept], label=name, marker="o", markersize=4)
            if series:
                own.legend(fontsize=8)

    return chart_picture(draw, 6.5 * columns, 4 * rows, (rows, columns))
