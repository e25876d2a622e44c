"""A benchmark for people and for programs: table, JSON, CSV, and a plot of speed against quality or against the bound."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from rich.console import Group
from rich.table import Table

from unidiff.evaluation.report import table_of
from unidiff.files import check_writable, replacing, write_json
from unidiff.pipelines.sheet import INK, PAPER, Cell, draw_sheet, save_image

ENDINGS = (".json", ".csv", ".png")
Point = tuple[float, float]
LINE = (214, 217, 224)
COLOURS = ((31, 119, 180), (214, 39, 40), (44, 160, 44), (148, 103, 189), (255, 127, 14), (23, 190, 207), (140, 86, 75))
WIDTH, HEIGHT = 760, 480


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
    cells = [Cell((scatter(own, *names),), heading=title) for title, own in (panels or {whole: {}}).items()]
    return draw_sheet([cells[i : i + 2] for i in range(0, len(cells), 2)], WIDTH)


def scatter(series: Mapping[str, Sequence[Point]], x_name: str, y_name: str) -> Image.Image:
    """Points (x, y) by series, joined from left to right, on a logarithmic x axis; those that are not finite are left out.

    Raises:
        ValueError: an x that is not positive.
    """
    kept = {n: sorted(p for p in points if all(map(math.isfinite, p))) for n, points in series.items()}
    every = [p for points in kept.values() for p in points]
    if any(x <= 0 for x, _ in every):
        raise ValueError(f"the x axis is logarithmic, but the smallest x is {min(x for x, _ in every)}")
    canvas = Image.new("RGB", (WIDTH, HEIGHT), PAPER)
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(13)
    left, top, right, bottom = 70, 30, WIDTH - 190, HEIGHT - 60
    (low, high), (floor, ceiling) = _range([math.log10(x) for x, _ in every]), _range([y for _, y in every])

    def place(x: float, y: float) -> Point:
        across = (math.log10(x) - low) / (high - low)
        return left + across * (right - left), bottom - (y - floor) / (ceiling - floor) * (bottom - top)

    for i in range(5):
        x, y = 10 ** (low + (high - low) * i / 4), floor + (ceiling - floor) * i / 4
        across, up = place(x, y)
        draw.line((left, up, right, up), LINE)
        draw.line((across, top, across, bottom), LINE)
        draw.text((left - 6, up), f"{y:.3g}", INK, font, anchor="rm")
        draw.text((across, bottom + 6), f"{x:.3g}", INK, font, anchor="ma")
    draw.text(((left + right) / 2, bottom + 28), x_name, INK, font, anchor="ma")
    draw.text((left, top - 8), y_name, INK, font, anchor="ls")
    for number, (name, points) in enumerate(kept.items()):
        colour, line = COLOURS[number % len(COLOURS)], top + 18 * number
        dots = [place(*p) for p in points]
        if len(dots) > 1:
            draw.line(dots, colour, 2)
        for across, up in dots:
            draw.ellipse((across - 4, up - 4, across + 4, up + 4), colour)
        draw.rectangle((right + 16, line + 2, right + 26, line + 12), colour)
        draw.text((right + 32, line), name, INK, font)
    return canvas


def _range(values: Sequence[float]) -> Point:
    """Lowest and highest with some room, never equal."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    room = 0.06 * (high - low) or 0.5
    return low - room, high + room
