"""What a run says while it goes: JSON lines, trackers, and one progress line."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO

import torch

from unidiff.errors import reading, writing
from unidiff.files import replacing
from unidiff.train.run.trackers import Tracker, open_trackers


class RunLog:
    """`metrics.jsonl` in the run's folder, one object per line with `step`, and the trackers.

    Args:
        folder: the run's folder.
        start_step: lines of later steps, left by a killed run, are dropped.
        trackers: where else numbers and pictures go, names of `unidiff.train.config.TRACKERS`.
        project: of the trackers that have projects.
        about: the run's settings, for the trackers that show them.
        silent: write nothing (all processes of a run but one).

    Raises:
        ValueError: a tracker is not installed or does not start.
    """

    def __init__(
        self,
        folder: Path,
        start_step: int,
        trackers: Sequence[str] = (),
        project: str = "unidiff",
        about: Mapping[str, Any] | None = None,
        silent: bool = False,
    ) -> None:
        self.path = folder / "metrics.jsonl"
        self._file: BinaryIO | None = None
        self._trackers: list[Tracker] = []
        if silent:
            return
        last = _truncate(self.path, start_step)
        self._trackers = open_trackers(trackers, folder, start_step, last, project, about or {})
        with writing(self.path):
            self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 (closed by close)

    def write(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        """One line `{"step", "kind", "time", **values}`; numbers that are not finite become null.

        Trackers get the finite ones, named `kind/key`.

        Raises:
            OSError: the disk is full and the like; the file then ends with its last whole line.
        """
        if self._file is None:
            return
        plain = {k: v if math.isfinite(v) else None for k, v in values.items()}
        line = {"step": step, "kind": kind, "time": round(time.time(), 2), **plain}
        with writing(self.path):
            _append(self._file, (json.dumps(line) + "\n").encode())
        for tracker in self._trackers:
            tracker.write(step, {f"{kind}/{key}": value for key, value in plain.items() if value is not None})

    def image(self, step: int, name: str, picture: torch.Tensor) -> None:
        """A uint8 `[3, H, W]` picture for the trackers."""
        for tracker in self._trackers:
            tracker.image(step, name, picture)

    def flush(self) -> None:
        """Wait until all lines are on the disk: a checkpoint is never newer than the log of its steps."""
        if self._file is not None:
            with writing(self.path):
                os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        for tracker in self._trackers:
            tracker.close()


def _append(file: BinaryIO, line: bytes) -> None:
    """The whole line or none of it."""
    end = os.fstat(file.fileno()).st_size
    try:
        rest = memoryview(line)
        while rest:
            rest = rest[file.write(rest) :]
    except OSError:
        with suppress(OSError):
            os.truncate(file.fileno(), end)
        raise


_OPENING = b'{"step": '
"""How every line begins that a run writes."""


def _truncate(path: Path, step: int) -> int:
    """Drop the lines of steps after `step`, which come again, and a last line that was cut; returns the last step there was.

    What is no line of a run is left as it is.
    """
    if not path.exists():
        return 0
    with reading(path, "the log of a run"):
        content = path.read_bytes()
    kept, last = [], 0
    for line in content.splitlines(keepends=True):
        number = _step_of(line)
        last = max(last, number or 0)
        cut = number is None and not line.endswith(b"\n") and line.startswith(_OPENING[: len(line)])  # one of ours
        if not cut and (number is None or number <= step):
            kept.append(line if line.endswith(b"\n") else line + b"\n")
    with replacing(path) as temporary:
        temporary.write_bytes(b"".join(kept))
    return last


def _step_of(line: bytes) -> int | None:
    try:
        content = json.loads(line)
    except (ValueError, RecursionError):
        return None
    number = content.get("step") if isinstance(content, dict) else None
    return number if type(number) is int else None


class Progress:
    """Throughput and time left: a live bar on a terminal, a plain line every `every` steps elsewhere."""

    def __init__(self, steps: int, start: int, tokens_per_step: int, every: int, shown: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as Bar

        self._steps, self._tokens, self._every, self._shown = steps, tokens_per_step, every, shown
        self.seconds_per_step, self._last = 0.0, time.perf_counter()
        console = Console()
        self._bar: Bar | None = None
        if shown and console.is_terminal:
            columns = (TextColumn("train"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
            self._bar = Bar(*columns, console=console)
            self._task = self._bar.add_task("train", total=steps, completed=start, note="")
            self._bar.start()

    def restart_clock(self) -> None:
        """Leave the time since the last step (validation, saving) out of the throughput."""
        self._last = time.perf_counter()

    def step(self, step: int, said: str) -> None:
        """After a step, with what to say about it."""
        now = time.perf_counter()
        spent, self._last = now - self._last, now
        self.seconds_per_step = 0.95 * self.seconds_per_step + 0.05 * spent if self.seconds_per_step else spent
        seconds = max(self.seconds_per_step, 1e-9)
        if not self._shown:
            return
        left = timedelta(seconds=int((self._steps - step) * seconds))
        note = f"{said}  {seconds:.3f} s/step  {self._tokens / seconds:,.0f} tokens/s  left {left}"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, note=note)
        elif self._every and step % self._every == 0:
            print(f"step {step}/{self._steps}  {note}", flush=True)

    def say(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        elif self._shown:
            print(text, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
