"""`report.html`: everything that a run's folder says of it, on one page without other files; and runs side by side."""

from __future__ import annotations

import html
import json
import logging
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import yaml

from unidiff.charts import inline_chart
from unidiff.config import flat
from unidiff.errors import DamagedFile, reading
from unidiff.files import LOCK, replace_text
from unidiff.html_page import html_page, image_address

METRICS, REPORT = "metrics.jsonl", "report.html"
_LOG = logging.getLogger(__name__)
_POINTS, _SHEETS = 600, 12  # of a curve, of a page
_CHARTS = (  # title, kind of line, keys: the first that fits takes a key
    ("", "skipped", ".*"),
    ("", "train", "share/.*|samples|seconds|skipped|data_skipped"),
    ("NLL of hidden tokens, nats each", "train", "nll/.*"),
    ("NLL by mask rate, nats each", "train", "nll_at/.*"),
    ("Validation, joint NELBO of held-out rows, nats each", "validation", "joint_nelbo(_text|_image)?"),
    ("Validation by task, NELBO, nats each", "validation", r"\w+_nelbo"),
    ("", "validation", r"\w+_(error|words)|joint_nelbo_per_token"),
    ("Learning rate, as a share of the highest", "train", "lr_factor"),
    ("Throughput, tokens per second", "train", "tokens_per_second"),
    ("Seconds per step", "train", "seconds_per_step"),
)
_STYLE = """
.charts { display: flex; flex-wrap: wrap; gap: 8px } .charts svg { width: 560px; max-width: 100%; height: auto }
figure { margin: 12px 0 } figcaption, .quiet { color: var(--soft) } div { overflow-x: auto }
"""


@dataclass(frozen=True)
class RunRecord:
    """What a run's folder says: its lines by kind and key, `(step, value)` each, and its settings by dotted name."""

    folder: Path
    series: dict[tuple[str, str], list[tuple[int, float]]]
    settings: dict[str, Any] = field(default_factory=dict)
    first: float = 0.0  # seconds since 1970, of the first and last line
    last: float = 0.0

    @property
    def step(self) -> int:
        return max((points[-1][0] for points in self.series.values()), default=0)

    @property
    def goes(self) -> bool:
        """Whether a process works in the folder, as far as its lock says."""
        return (self.folder / LOCK).is_file()

    def best(self) -> tuple[str, float] | None:
        """The number that validation is judged by, and its best value."""
        for key, choose in (("joint_nelbo", min), ("psnr", max)):
            if points := self.series.get(("validation", key)):
                return key, choose(value for _, value in points)
        points = self.series.get(("reward", "reward"))
        return None if not points else ("reward", max(value for _, value in points))

    @classmethod
    def read(cls, folder: Path) -> RunRecord:
        """Read `metrics.jsonl` and `config.yaml`. Raises DamagedFile for a log or settings that cannot be read."""
        series: dict[tuple[str, str], list[tuple[int, float]]] = {}
        times = []
        with reading(folder / METRICS, "the log of a run"), open(folder / METRICS, encoding="utf-8") as file:
            lines = [json.loads(line) for line in file if line.endswith("\n")]
        for line in lines:
            if not (isinstance(line, dict) and isinstance(line.get("step"), int)):
                continue
            times += [line["time"]] if isinstance(line.get("time"), int | float) else []
            for key, value in line.items():
                if key not in ("step", "kind", "time") and type(value) in (int, float):
                    series.setdefault((str(line.get("kind")), key), []).append((line["step"], float(value)))
        path, settings = folder / "config.yaml", {}
        if path.is_file():
            with reading(path, "the settings of a run"):
                settings = flat(yaml.safe_load(path.read_text(encoding="utf-8")) or {})
        return cls(folder, series, settings, min(times, default=0.0), max(times, default=0.0))


def find_runs(folders: Sequence[Path]) -> list[RunRecord]:
    """Every run in these folders or below them, the latest last. Raises FileNotFoundError where there is none."""
    found: dict[Path, RunRecord] = {}
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(f"{str(folder)!r} is no folder; name the folder of a run, or one of runs")
        for path in sorted(folder.rglob(METRICS)):
            try:
                found[path.parent] = RunRecord.read(path.parent)
            except DamagedFile as error:
                _LOG.warning("%s", error)
    if not found:
        raise FileNotFoundError(f"no run is in {', '.join(map(str, folders))}: no folder there has a {METRICS}")
    return sorted(found.values(), key=lambda run: run.last)


def differing(runs: Sequence[RunRecord]) -> dict[str, list[Any]]:
    """Settings that are not the same in all runs, by dotted name, with the value in each (None: it has none)."""
    names = sorted({name for run in runs for name in run.settings} - {"output", "out"})
    values = {name: [run.settings.get(name) for run in runs] for name in names}
    return {name: found for name, found in values.items() if any(value != found[0] for value in found)}


def write_report(folder: Path, about: Mapping[str, Any] | None = None) -> Path:
    """Write `report.html` anew from what is in a run's folder; `about`: its settings, where no `config.yaml` says them."""
    run = RunRecord.read(folder)
    settings = run.settings or flat(about or {})
    steps = settings.get("steps")
    facts = {
        "step": f"{run.step}" + (f" of {steps}" if steps else ""),
        "time": str(timedelta(seconds=int(run.last - run.first))),
        "written": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    if best := run.best():
        facts[f"best {best[0]}"] = f"{best[1]:.4g}"
    skipped = len({step for (kind, _), points in run.series.items() if kind == "skipped" for step, _ in points})
    facts |= {"skipped steps": str(skipped)} if skipped else {}
    rows = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in facts.items())
    parts = [f"<table>{rows}</table>", f'<div class="charts">{"".join(charts([run]))}</div>', *_sheets(folder)]
    for name, title in (
        ("skipped.json", "Data left out"),
        ("report.json", "The kept model"),
        ("decoding.json", "Decoding"),
    ):
        if (folder / name).is_file():
            parts.append(f"<h2>{title}</h2><pre>{html.escape(_shortened(folder / name))}</pre>")
    if settings:
        lines = "\n".join(f"{name}: {json.dumps(value, default=str)}" for name, value in settings.items())
        parts.append(f"<h2>Settings</h2><pre>{html.escape(lines)}</pre>")
    return _page(folder / REPORT, folder.resolve().name, parts)


def write_comparison(runs: Sequence[RunRecord], path: Path) -> Path:
    """One page with the curves of several runs and the settings in which they differ."""
    head = "".join(f"<th>{html.escape(str(run.folder))}</th>" for run in runs)
    rows = [(name, [json.dumps(value) for value in values]) for name, values in differing(runs).items()]
    lines = [
        f"<tr><th>{html.escape(name)}</th>{''.join(f'<td>{html.escape(v)}</td>' for v in row)}</tr>"
        for name, row in rows
    ]
    table = f"<h2>Settings that differ</h2><table><tr><td></td>{head}</tr>{''.join(lines)}</table>"
    return _page(path, "Runs", [f'<div class="charts">{"".join(charts(runs))}</div>', table])


def charts(runs: Sequence[RunRecord]) -> Iterator[str]:
    """A drawing (SVG) for every group of numbers that some run has."""
    groups: dict[str, list[tuple[str, list[tuple[int, float]]]]] = {}
    for run in runs:
        own = f"{run.folder.name} " if len(runs) > 1 else ""
        for (kind, key), points in run.series.items():
            title = next((t for t, of, keys in _CHARTS if of == kind and re.fullmatch(keys, key)), f"{kind}: {key}")
            if title:
                groups.setdefault(title, []).append((own + key, points))
    order = [title for title, *_ in _CHARTS]
    for title in sorted(groups, key=lambda t: (t != "train: loss", order.index(t) if t in order else len(order), t)):
        yield _chart(title, groups[title])


def _chart(title: str, curves: Sequence[tuple[str, list[tuple[int, float]]]]) -> str:
    def draw(axes: Any) -> None:
        for name, points in curves:
            stride = max(1, len(points) // _POINTS)
            steps, shown = zip(*(*points[::stride], points[-1]), strict=True)
            axes.plot(steps, shown, label=name, marker="." if len(steps) < 4 else "")
        values = sorted(value for _, points in curves for _, value in points)
        if len(values) > 50 and values[0] < values[-1] > 3 * values[-1 - len(values) // 50]:
            axes.set_ylim(top=1.3 * values[-1 - len(values) // 50])  # a few first steps would press the rest flat
        axes.set_title(title, fontsize=11, loc="left")
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        if len(curves) > 1:
            axes.legend(fontsize=8, framealpha=0)

    return inline_chart(draw, 7, 3.4, title)


def _sheets(folder: Path) -> Iterator[str]:
    """Sample sheets over time, at most `_SHEETS` of them, the first and the last among them."""
    found = sorted((folder / "samples").glob("step-*.png"))
    if len(found) > _SHEETS:
        found = [found[round(n * (len(found) - 1) / (_SHEETS - 1))] for n in range(_SHEETS)]
    found += [path for path in (folder / "reconstructions.png",) if path.is_file()]
    if found:
        yield "<h2>Samples</h2>"
    for path in reversed(found):
        shown = image_address(path.read_bytes(), "png")
        yield f'<figure><figcaption>{path.stem}</figcaption><img src="{shown}" alt="samples, {path.stem}"></figure>'


def _shortened(path: Path, most: int = 4000) -> str:
    """The text of a small JSON file; of a large one its beginning."""
    with reading(path, "JSON"):
        text = path.read_text(encoding="utf-8")
    return text if len(text) <= most else f"{text[:most]}\n..."


def _page(path: Path, title: str, parts: Sequence[str]) -> Path:
    replace_text(path, html_page(title, parts, _STYLE))
    return path
