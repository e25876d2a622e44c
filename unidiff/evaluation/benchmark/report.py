"""A benchmark for people and for programs: table, JSON, CSV, and a plot of speed against quality or against the bound."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from PIL import Image
from rich.console import Group
from rich.table import Table

from unidiff.evaluation.benchmark.decode import Benchmark, Row
from unidiff.evaluation.charts import Point, scatter, stack
from unidiff.files import check_writable, replace_text, replacing
from unidiff.pipelines.sheet import save_image

HEADS = ("policy", "nfe", "seconds", "speed-up", "bound", "corrected", "share", "outside", "of peak", "quality")


def tables(benchmark: Benchmark) -> Group:
    """One table per decode with a line per policy, under a heading."""
    blocks = benchmark.about.get("blocks", "all")
    title = f"{benchmark.suite}: {benchmark.about.get('what', '')}"
    parts: dict[str, Table] = {}
    for row in benchmark.rows:
        if label(row) not in parts:
            parts[label(row)] = table = Table(title=label(row), title_justify="left")
            for number, head in enumerate(HEADS):
                table.add_column(head, justify="right" if number else "left", no_wrap=True)
        parts[label(row)].add_row(
            row.policy,
            str(row.nfe),
            f"{row.seconds:.3g}",
            f"{row.speedup:.2f}",
            _number(row.bound, ".2f"),
            _number(row.bound_corrected, ".2f"),
            _number(row.fraction_of_bound, ".0%"),
            _number(row.outside_share, ".1%"),
            _number(row.peak_share, ".0%"),
            _number(row.quality, ".3f"),
        )
    steps = [
        f"{m['workload']}: a full pass {m['steps']['full']['seconds'] * 1e3:.3g} ms, "
        f"{m['steps']['full']['share']:.0%} of the roofline, a cached one {m['steps']['cached']['seconds'] * 1e3:.3g} ms, "
        f"{m['steps']['cached']['share']:.0%}"
        for m in benchmark.about.get("matmul", [])
    ]
    title += "" if blocks == "all" else f" (only {blocks} blocks of each row)"
    return Group(title, *parts.values(), *steps)


def label(row: Row) -> str:
    """A decode in a few words."""
    w = row.workload
    block = "" if w["block"] is None else f" block {w['block']}"
    passes = "" if w["passes"] is None else f" x {w['passes']}"
    rows = "" if w["batch"] == 1 else f", {w['batch']} rows"
    return f"{w['text']}+{w['image']} {w['dtype']}, {w['rule']}{block}{passes}{rows}"


def write(benchmark: Benchmark, path: Path) -> list[Path]:
    """`path` (.json), and beside it the same rows as .csv and a plot as .png; each appears complete or not at all.

    Raises:
        ValueError: a path that does not end in .json.
    """
    check_path(path)
    data = benchmark.to_dict()
    replace_text(path, json.dumps(data, indent=1) + "\n")
    rows = [{k: v for k, v in row.items() if k not in ("stats", "seconds_all")} for row in data["rows"]]
    with replacing(path.with_suffix(".csv")) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)
    save_image(plot(benchmark), path.with_suffix(".png"))
    return [path, path.with_suffix(".csv"), path.with_suffix(".png")]


def check_path(path: Path) -> None:
    """Before any work: whether `write` will be able to.

    Raises:
        ValueError: a path that does not end in .json, or where no file can be written. OSError: no permission.
    """
    if path.suffix != ".json":
        raise ValueError(f"output {str(path)!r} must end in .json")
    for ending in (".json", ".csv", ".png"):
        check_writable(path.with_suffix(ending))


def plot(benchmark: Benchmark) -> Image.Image:
    """Speed-up over the corrected bound; where there is a quality, that over seconds, a panel for every task and batch."""
    panels: dict[str, dict[str, list[Point]]] = {}
    series: dict[str, list[Point]] = {}
    for row in benchmark.rows:
        if row.quality is not None:
            batch = row.workload["batch"]
            panel = panels.setdefault(f"{row.workload['task']}, {batch} row{'s' * (batch > 1)}", {})
            panel.setdefault(row.policy, []).append((row.seconds, row.quality))
        elif row.policy != "none" and row.bound_corrected:
            series.setdefault(row.policy, []).append((row.bound_corrected, row.speedup))
    if panels:
        charts = [scatter(own, name, "seconds per row", "share of right answers") for name, own in panels.items()]
        return stack(charts, min(2, len(charts)))
    return scatter(series, f"{benchmark.suite}: speed-up and its bound", "corrected bound", "measured speed-up")


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
