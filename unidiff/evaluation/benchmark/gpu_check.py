"""Checks of an accelerator, one after the other within a time: what each found, what failed, what was not run and why.

Checks run in a process of their own. One that takes too long is ended, and one that fails is noted; the next begins in a
fresh process, since an error of a device stays with the process that met it. What has passed is kept.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from html import escape
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from unidiff.errors import explain, few, first_line
from unidiff.evaluation.benchmark.measure import Cells, machine
from unidiff.evaluation.report import sources_hash
from unidiff.files import check_writable, replace_text, write_json
from unidiff.html_page import html_page

LIMIT = 480.0
"""Seconds that all checks may take together."""
LEAST = 5.0  # seconds: with less left, no check is begun
Status = Literal["passed", "failed", "not run"]


@dataclass(frozen=True)
class Place:
    """Where checks run, and how large.

    Args:
        tiny: models and rows of the smallest shapes, for seconds on a CPU. seconds: that a check may take.
        root: of the sources, with `tests` and `configs`.
    """

    device: torch.device
    root: Path
    tiny: bool = False
    seconds: float = LIMIT


class Found(NamedTuple):
    """What a check measured: a line of plain values each; and in a sentence what is not as it should be."""

    rows: list[dict[str, Any]]
    wrong: str = ""


class NotRun(Exception):
    """Raised by a check that cannot be made here; the text says why."""


@dataclass(frozen=True)
class DeviceCheck:
    """One of them.

    Args:
        name: short. about: what it does, in a sentence. seconds: that it may take.
        run: makes it; a module's function. cuda: why it needs CUDA; empty where it runs anywhere.
    """

    name: str
    about: str
    seconds: float
    run: Callable[[Place], Found]
    cuda: str = ""


class Answer(NamedTuple):
    """How a check ended; `reason`, a sentence, where it did not pass."""

    status: Status
    reason: str = ""
    rows: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True)
class Outcome:
    """The answer of a check, with its name and its seconds; 0 where it was not run."""

    name: str
    about: str
    status: Status
    reason: str = ""
    rows: Sequence[Mapping[str, Any]] = ()
    seconds: float = 0.0


def run_checks(
    checks: Sequence[DeviceCheck], place: Place, out: Path, say: Callable[[str], None], limit: float = LIMIT
) -> list[Outcome]:
    """Make those that have not passed yet, and write `gpu-check.json`, `gpu-check.html` and `cells/` in the folder `out`.

    Both files are written anew after every check. Other sources, another machine or another size begin anew.

    Raises:
        ValueError, OSError: a folder that cannot be written, or a kept file that was changed.
    """
    files, cells = [out / f"gpu-check.{kind}" for kind in ("json", "html")], Cells(out / "cells")
    for file in files:
        check_writable(file)
    here = {**machine(place.device), "tiny": place.tiny, "cuda": place.device.type == "cuda"}
    sources = sorted(p for folder in ("unidiff", "tests") for p in (place.root / folder).rglob("*.py"))
    key = {"machine": here, "sources": sources_hash(sources)}
    worker, end = _Worker(checks, place), time.monotonic() + limit
    outcomes = [Outcome(c.name, c.about, "not run", "It was not reached.") for c in checks]
    try:
        for number, check in enumerate(checks):
            kept = cells.load(check.name, key)
            if kept is None:
                say(f"{check.name}: {check.about}")
                outcome = _outcome(check, place, worker, end)
                if outcome.status == "passed":
                    cells.measured(check.name, key, lambda: asdict(outcome))  # noqa: B023
            else:
                outcome = Outcome(**kept)
            say(f"{check.name}: {outcome.status}, {outcome.seconds:.1f} s {outcome.reason}")
            outcomes[number] = outcome
            write_json(files[0], {"about": here, "checks": [asdict(o) for o in outcomes]})
            replace_text(files[1], page(outcomes, here))
    finally:
        worker.stop()
    return outcomes


def _outcome(check: DeviceCheck, place: Place, worker: _Worker, end: float) -> Outcome:
    if check.cuda and place.device.type != "cuda":
        return Outcome(check.name, check.about, *Answer("not run", f"No CUDA device is here: {check.cuda}."))
    worker.start(end - time.monotonic())
    left = end - time.monotonic()
    if left < LEAST:
        over = Answer("not run", "The time was used up; run the command again, which goes on here.")
        return Outcome(check.name, check.about, *over)
    begun = time.monotonic()
    found = worker(check.name, left if place.tiny else min(check.seconds, left))
    return Outcome(check.name, check.about, *found, time.monotonic() - begun)


class _Worker:
    """A process that makes checks; started at the first, and again after one that failed."""

    def __init__(self, checks: Sequence[DeviceCheck], place: Place) -> None:
        self._runs, self._place = {c.name: c.run for c in checks}, place
        self._process: BaseProcess | None = None

    def start(self, left: float) -> None:
        """Have it ready: imports and the first touch of a device take long, and are no check's fault."""
        if self._process is None:
            context = get_context("spawn")
            self._pipe, there = context.Pipe()
            self._process = context.Process(target=_serve, args=(there, self._runs, self._place), daemon=True)
            self._process.start()
            there.close()
            self._answer(left)

    def __call__(self, name: str, seconds: float) -> Answer:
        with suppress(BrokenPipeError):  # then there is no answer either
            self._pipe.send((name, seconds))
        found = self._answer(seconds)
        if found.status == "failed":
            self.stop()
        return found

    def _answer(self, seconds: float) -> Answer:
        try:
            if self._pipe.poll(seconds):
                return self._pipe.recv()
        except (EOFError, ConnectionError):
            return Answer("failed", "Its process ended by itself.")
        return Answer("failed", f"It took more than {seconds:.0f} s and was ended.")

    def stop(self) -> None:
        if self._process is not None:
            self._pipe.close()  # where it waits, it leaves
            self._process.join(1)
            self._process.kill()
            self._process.join()
        self._process = None


def _serve(pipe: Connection, runs: Mapping[str, Callable[[Place], Found]], place: Place) -> None:
    """Make what is asked for, until the process is ended."""
    torch.zeros(1, device=place.device)
    pipe.send(Answer("passed"))
    while True:
        try:
            name, seconds = pipe.recv()
        except EOFError:
            return
        try:
            found = runs[name](replace(place, seconds=seconds))
            answer = Answer("failed" if found.wrong else "passed", found.wrong, found.rows)
        except NotRun as error:
            answer = Answer("not run", str(error))
        except Exception as error:
            answer = Answer("failed", explain(error) or f"{type(error).__name__}: {first_line(error)}")
        if place.device.type == "cuda" and answer.status != "failed":
            gc.collect()
            torch.cuda.empty_cache()
        pipe.send(answer)


_STYLE = """
body { max-width: 62rem } div { overflow-x: auto }
th, td { border-bottom: 1px solid var(--line); overflow-wrap: normal } th { font-weight: 600; color: var(--soft) }
"""


def page(outcomes: Sequence[Outcome], about: Mapping[str, Any]) -> str:
    """All of it as one HTML file that needs no other."""
    by_status = {s: [o.name for o in outcomes if o.status == s] for s in ("passed", "failed", "not run")}
    counts = ", ".join(f"{len(names)} {status}" for status, names in by_status.items())
    lines = [f"<p>Checks: {counts}.</p>"]
    if not about["cuda"]:
        lines.append("<p><b>No CUDA device was used: nothing on this page was run on a GPU.</b></p>")
    if about["tiny"]:
        lines.append("<p>Shapes are tiny: they show that the checks run. The times say nothing about real models.</p>")
    where = f"torch {about['torch']}, {about['threads']} CPU threads ({about['cpu_capability']})"
    lines.append(f'<p class="soft">{escape(where)}</p>')
    for outcome in outcomes:
        spent = f", {outcome.seconds:.1f} s" if outcome.seconds else ""
        said = f"{escape(outcome.about)} <b>{outcome.status}{spent}.</b> {escape(outcome.reason)}"
        lines.append(f"<h2>{escape(outcome.name)}</h2><p>{said}</p>{_table(outcome.rows)}")
    return html_page(f"unidiff on {about['device']}", lines, _STYLE)


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return ""
    heads = list(dict.fromkeys(name for row in rows for name in row))
    shown = lambda value: f"{value:.4g}" if isinstance(value, float) else escape(str(value))  # noqa: E731
    line = lambda kind, cells: f"<tr>{''.join(f'<{kind}>{shown(cell)}</{kind}>' for cell in cells)}</tr>"  # noqa: E731
    body = "".join(line("td", [row.get(name, "") for name in heads]) for row in rows)
    return f"<div><table>{line('th', heads)}{body}</table></div>"


def summary(outcomes: Sequence[Outcome]) -> str:
    """One sentence for the end of the command."""
    failed, left = ([o.name for o in outcomes if o.status == s] for s in ("failed", "not run"))
    said = f"{len(outcomes) - len(failed) - len(left)} of {len(outcomes)} checks passed"
    said += f"; failed: {few(failed, 20)}" if failed else ""
    return said + (f"; not run: {few(left, 20)}" if left else "")
