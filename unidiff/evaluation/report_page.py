"""The files of an evaluation: `report.html`, one page with everything in it, `report.json`, `numbers.csv` and `cases.csv`."""

from __future__ import annotations

import csv
import html
import io
import json
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from unidiff.charts import inline_chart
from unidiff.config import flat
from unidiff.evaluation.report import Estimate, EvaluationReport, JudgedCase, Measure
from unidiff.files import replace_text, replacing
from unidiff.html_page import html_page, image_address

PAGE, DATA, NUMBERS, CASES = FILES = ("report.html", "report.json", "numbers.csv", "cases.csv")
_MOST = 12  # failures of a task on the page; and as many right cases at most
_TIMES = ("seconds",)  # they differ from run to run, so they are in no file
_STYLE = """:root{--bad:#b3261e;--good:#146c2e}@media (prefers-color-scheme:dark){:root{--bad:#ff8a80;--good:#7ddb95}}
body{font-size:15px}svg{max-width:100%;height:auto}.charts{display:flex}nav{display:flex;flex-wrap:wrap;gap:6px 14px;margin:14px 0}a{color:inherit}
.wide{display:grid;grid-template-columns:minmax(0,1fr) minmax(0,1fr);gap:8px 32px;align-items:start}
h2{margin-top:44px;padding-top:14px;border-top:1px solid var(--line)}h3{font-size:16px;margin:26px 0 8px}
.numbers{width:100%;font-variant-numeric:tabular-nums}.numbers td,.numbers th{padding:5px 10px 5px 0;border-bottom:1px solid var(--line)}
.numbers th{font-weight:400}.numbers thead th{color:var(--soft);font-size:13px}.numbers .n{text-align:right;white-space:nowrap}
.numbers .n:last-child,.numbers th.n:last-child{padding-right:0}.numbers tr.headline th,.numbers tr.headline td{font-weight:650}
.sheet{display:grid;grid-template-columns:repeat(auto-fill,minmax(250px,1fr));gap:14px;margin:10px 0}
.case{margin:0;padding:12px;background:var(--raised);border-radius:8px;border-left:4px solid var(--good);overflow-wrap:anywhere}
.case.wrong{border-left-color:var(--bad)}.shots{display:flex;gap:8px;margin-bottom:8px}.shots div{font-size:12px;color:var(--soft)}
.shots img{display:block;width:112px;height:auto;image-rendering:pixelated;border-radius:4px;outline:1px solid var(--line)}
.case figcaption{color:var(--ink);font-size:14px;line-height:1.4}.case .tag{display:block;color:var(--soft);font-size:12.5px;margin-bottom:4px}
.case .tag b{color:var(--good)}.case.wrong .tag b{color:var(--bad)}dl{margin:0}dl div{margin:3px 0}dt{display:inline;color:var(--soft)}dt:after{content:": "}
dd{display:inline;margin:0}details{margin:10px 0}summary{cursor:pointer;padding:6px 0}
.settings{width:100%;table-layout:fixed}.settings td{overflow-wrap:anywhere}.settings th{width:38%;font-weight:400;color:var(--soft);overflow-wrap:anywhere}
@media (max-width:720px){body{margin:14px auto}.wide{grid-template-columns:minmax(0,1fr)}.sheet{grid-template-columns:minmax(0,1fr)}
h1{font-size:21px}.numbers{font-size:14px}.numbers .cases{display:none}.numbers td:nth-child(3),.numbers th:nth-child(3){padding-right:0}
.shots img{width:104px}.case.one{display:grid;grid-template-columns:auto minmax(0,1fr);gap:12px}}
"""


def write_files(report: EvaluationReport, folder: Path, title: str) -> list[Path]:
    """Write all files of an evaluation, each complete or not at all; the same evaluation gives the same bytes.

    Args:
        report: with its cases and measures. folder: made where it does not exist. title: of the page.
    """
    values = {key: value for key, value in report.values.items() if key not in _TIMES}
    kept = EvaluationReport(values, report.intervals, report.about, report.cases, report.measures)
    kept.save(folder / DATA, outcomes=True)
    _write_rows(folder / NUMBERS, ("task", "measure", "value", "low", "high", "cases"), _number_rows(kept))
    names = ("task", "category", "number", "right", "asked", "wrote", "seen", "expected", "row")
    _write_rows(folder / CASES, names, ([getattr(case, name) for name in names] for case in kept.cases))
    _write_html(kept, folder / PAGE, title)
    return [folder / name for name in FILES]


def _write_rows(path: Path, head: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(head)
        writer.writerows(rows)


def _number_rows(report: EvaluationReport) -> Iterator[Sequence[Any]]:
    for key, value in report.values.items():
        e = report.intervals.get(key)
        yield (_measure(report, key).task, key, repr(value), *((repr(e.low), repr(e.high), e.n) if e else ("", "", "")))


def _measure(report: EvaluationReport, key: str) -> Measure:
    return report.measures.get(key) or Measure("", key.replace(".", ": ").replace("_", " "))


def _write_html(report: EvaluationReport, path: Path, title: str) -> None:
    tasks: dict[str, list[str]] = {}
    for key in report.values:
        tasks.setdefault(_measure(report, key).task, []).append(key)
    for case in report.cases:
        tasks.setdefault(case.task, [])
    first = {_measure(report, key).task for key in report.values if _measure(report, key).headline}
    tasks = {task: keys for has in (True, False) for task, keys in tasks.items() if (task in first) is has}
    headlines = [key for key in report.values if _measure(report, key).headline]
    links = "".join(f'<a href="#{_anchor(task)}">{html.escape(_title(task))}</a>' for task in tasks)
    parts = [
        f'<p class="soft">{html.escape(_lead(report.about))}</p>',
        f'<nav aria-label="tasks">{links}<a href="#settings">Settings</a></nav>',
    ]
    if headlines:
        names = {key: _title(_measure(report, key).task) for key in headlines}
        parts += ['<section aria-label="summary">', _numbers(report, headlines, names, "Summary"), "</section>"]
    for task, keys in tasks.items():
        parts += [f'<section id="{_anchor(task)}"><h2>{html.escape(_title(task))}</h2>']
        parts += [_numbers_of_task(report, keys, task)]
        parts += [*_sheets([case for case in report.cases if case.task == task]), "</section>"]
    replace_text(path, html_page(title, [*parts, _settings(report.about)], _STYLE))


def _lead(about: Mapping[str, Any]) -> str:
    """What was measured, in a line."""
    per_task, n = about.get("per_task"), about.get("n")
    said = {
        "suite {}": about.get("suite"),
        "{:,} cases per task": per_task,
        "{:,} cases per category": None if per_task else n,
        "seed {}": about.get("seed"),
        "{}": about.get("dtype"),
        "unidiff {}": (about.get("versions") or {}).get("unidiff"),
    }
    return " \u00b7 ".join(words.format(value) for words, value in said.items() if value is not None)


def _numbers_of_task(report: EvaluationReport, keys: Sequence[str], task: str) -> str:
    """The headline and all that is better higher; below, folded, the other numbers."""
    order = sorted(keys, key=lambda key: not _measure(report, key).headline)
    main = [key for key in order if _measure(report, key).better == "higher"]
    other = [key for key in order if key not in main]
    if not main or len(other) < 3:
        return _numbers(report, order, {}, _title(task))
    more = _numbers(report, other, {}, _title(task))
    return f"{_numbers(report, main, {}, _title(task))}<details><summary>{len(other)} more numbers</summary>{more}</details>"


def _title(task: str) -> str:
    words = task.replace("_", " ") or "numbers"
    return words[:1].upper() + words[1:]


def _anchor(task: str) -> str:
    return "task-" + re.sub(r"[^\w-]", "-", task)


def _numbers(report: EvaluationReport, keys: Sequence[str], names: Mapping[str, str], title: str) -> str:
    """A table of numbers, and beside it a chart of those that are shares."""
    if not keys:
        return ""
    rows, shown = [], dict[str, Estimate]()
    for key in keys:
        measure, e = _measure(report, key), report.intervals.get(key)
        words = f"{names[key]}: {measure.words}" if key in names else measure.words
        low = f"{_number(e.low)} to {_number(e.high)}" if e else ""
        less = ' <span class="soft">(lower is better)</span>' if measure.better == "lower" else ""
        rows.append(
            f'<tr{" class=headline" if measure.headline and not names else ""}><th scope="row">{html.escape(words)}{less}</th>'
            f'<td class="n">{_number(report.values[key])}</td><td class="n">{low}</td>'
            f'<td class="n cases">{e.n if e else ""}</td></tr>'
        )
        if e is not None and measure.better == "higher" and 0 <= e.low <= e.high <= 1:
            shown[names.get(key, measure.words)] = e
    head = (
        '<th scope="col">Measure</th><th class="n" scope="col">Value</th><th class="n" scope="col">95 % interval</th>'
    )
    table = (
        f'<table class="numbers"><thead><tr>{head}<th class="n cases" scope="col">Cases</th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table>"
    )
    if len(shown) < 2:
        return table
    return f'<div class="wide"><div>{table}</div><div class="charts">{_chart(shown, title)}</div></div>'


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.2f}"


def _chart(shown: Mapping[str, Estimate], title: str) -> str:
    """Shares with their intervals, one below the other."""
    names = ["\n".join(textwrap.wrap(name, 26, max_lines=2, placeholder="\u2026")) for name in shown]

    def draw(axes: Any) -> None:
        for place, e in enumerate(shown.values()):
            axes.plot([e.low, e.high], [place, place], color="#4c8dd6", linewidth=3, solid_capstyle="round", alpha=0.6)
            axes.plot(e.value, place, "o", color="#1f6fc4", markersize=6)
        axes.set_yticks(range(len(names)), names, fontsize=9)
        axes.set_ylim(len(names) - 0.4, -0.6)
        least = min(e.low for e in shown.values())
        start = max(0.0, np.floor(10 * least - 0.2) / 10)
        axes.set_xlim(start - 0.02 * (1 - start), 1 + 0.03 * (1 - start))
        tenths = round(10 * (1 - start))
        axes.set_xticks(1 - np.arange(0, tenths + 1, 1 if tenths <= 5 else 2)[::-1] / 10)
        axes.xaxis.set_major_formatter("{x:.2g}")
        axes.tick_params(axis="x", labelsize=9)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("share of cases, with 95 % interval", fontsize=9)
        axes.grid(axis="x", alpha=0.25)

    said = "; ".join(f"{name} {e.value:.3f} ({e.low:.3f} to {e.high:.3f})" for name, e in shown.items())
    return inline_chart(draw, 4.4, 0.75 + 0.36 * len(names), f"{title}: {said}")


def _sheets(cases: Sequence[JudgedCase]) -> Iterator[str]:
    """Failures first, all categories in turn; then right ones."""
    if not cases:
        return
    wrong, right = ([c for c in _in_turn(cases) if c.right is judged] for judged in (False, True))
    if wrong:
        more = f", of which {_MOST} are shown; all are in {CASES}" if len(wrong) > _MOST else ""
        yield f"<h3>Failures: {len(wrong)} of {len(cases)} cases{more}</h3>"
        yield f'<div class="sheet">{"".join(map(_case, wrong[:_MOST]))}</div>'
    else:
        yield f"<h3>No failure among {len(cases)} cases</h3>"
    if right:
        count = min(_MOST, len(right))
        yield f"<details{'' if wrong else ' open'}><summary>Right: {count} of {len(right)} cases</summary>"
        yield f'<div class="sheet">{"".join(map(_case, right[:_MOST]))}</div></details>'


def _in_turn(cases: Sequence[JudgedCase]) -> list[JudgedCase]:
    """The first of every category and judgement, then the second, ..."""
    counts: dict[tuple[str, bool], int] = {}
    places = []
    for case in cases:
        key = case.category, case.right
        counts[key] = counts.get(key, -1) + 1
        places.append(counts[key])
    return [case for _, case in sorted(zip(places, cases, strict=True), key=lambda pair: pair[0])]


def _case(case: JudgedCase) -> str:
    said = {
        "asked": case.asked,
        "wrote": case.wrote,
        "read from the picture": case.seen,
        "would be right": case.expected,
    }
    lines = "".join(f"<div><dt>{k}</dt><dd>{html.escape(v)}</dd></div>" for k, v in said.items() if v)
    shots = []
    for word, picture in case.pictures:
        alt = f"{word}, {case.asked or case.expected or case.category}" + (f": {case.seen}" if word == "drawn" else "")
        shots.append(f"<div>{_image(picture, alt)}{html.escape(word)}</div>")
    category = html.escape(case.category.replace("_", " "))
    tag = f"<b>{'right' if case.right else 'wrong'}</b> \u00b7 {category} {case.number}".replace("  ", " ")
    return (
        f'<figure class="case{"" if case.right else " wrong"}{" one" if len(shots) == 1 else ""}"><div class="shots">{"".join(shots)}</div>'
        f'<figcaption><span class="tag">{tag}</span><dl>{lines}</dl></figcaption></figure>'
    )


def _image(picture: np.ndarray, alt: str) -> str:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG", optimize=True)
    return f'<img src="{image_address(buffer.getvalue(), "png")}" alt="{html.escape(alt)}">'


def _settings(about: Mapping[str, Any]) -> str:
    """Plain settings in a table; groups of them, which are long, folded below it."""
    said = lambda value: html.escape(value if isinstance(value, str) else json.dumps(value, default=str))  # noqa: E731
    rows = "".join(
        f'<tr><th scope="row">{html.escape(name.replace("_", " "))}</th><td>{said(value)}</td></tr>'
        for name, value in about.items()
        if not isinstance(value, Mapping)
    )
    groups = "".join(
        f"<details><summary>{html.escape(name.replace('_', ' ').capitalize())}</summary>"
        f"<pre>{chr(10).join(f'{html.escape(key)}: {said(v)}' for key, v in flat(value).items())}</pre></details>"
        for name, value in about.items()
        if isinstance(value, Mapping)
    )
    files = (
        f'<p class="soft">{DATA} has all numbers and the outcome of every case, {NUMBERS} the numbers, {CASES} every '
        "case with its words, and rows/ what was drawn.</p>"
    )
    return f'<section id="settings"><h2>Settings</h2><table class="settings">{rows}</table>{groups}{files}</section>'
