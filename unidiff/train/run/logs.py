"""What a run says while it goes: JSON lines, trackers, and one progress line."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch

from unidiff.errors import reading, writing
from unidiff.files import replacing
from unidiff.train.config import TASKS, TrainConfig
from unidiff.train.cost.flops import RowShape, block_causal_pairs, model_size, row_flops
from unidiff.train.data.source import TokenSource
from unidiff.train.run.trackers import Tracker, open_trackers
from unidiff.train.step import TIME_BUCKETS, StepReport


class TaskMeter:
    """Sums step reports between two log lines; per task and modality apart."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._sums = torch.zeros(2, len(TASKS), 2, dtype=torch.float64)
        self._rows = torch.zeros(len(TASKS), dtype=torch.float64)
        self._by_time = torch.zeros(TIME_BUCKETS, 2, dtype=torch.float64)
        self._losses: list[float] = []
        self._norms: list[float] = []

    def add(self, report: StepReport) -> None:
        if not report.taken:
            return
        self._sums += torch.stack([report.nll, report.hidden]).double()
        self._rows += report.rows.double()
        self._by_time += report.by_time.double()
        self._losses.append(report.loss)
        self._norms.append(report.grad_norm)

    def take(self) -> dict[str, float]:
        """Means since the last call: `loss`, `grad_norm`, `share/<task>`, and nats per hidden token:
        `nll/<task>/<modality>`, and `nll_at/<from>-<to>` by mask rate."""
        if not self._losses:
            return {}
        out = {
            "loss": sum(self._losses) / len(self._losses),
            "grad_norm": sum(self._norms) / len(self._norms),
        }
        for number, task in enumerate(TASKS):
            if self._rows[number] > 0:
                out[f"share/{task}"] = float(self._rows[number] / self._rows.sum())
            for column, modality in enumerate(("text", "image")):
                nll, count = self._sums[:, number, column].tolist()
                if count > 0:
                    out[f"nll/{task}/{modality}"] = nll / count
        for number, (nll, count) in enumerate(self._by_time.tolist()):
            if count > 0:
                out[f"nll_at/{number / TIME_BUCKETS:.1f}-{(number + 1) / TIME_BUCKETS:.1f}"] = nll / count
        self._reset()
        return out


class SpeedMeter:
    """How fast a run goes between two log lines, and what it waits for.

    Args:
        config: model, batch and `logging.peak_tflops`.
        source: token counts of a row.
        processes: how many share the run.
    """

    def __init__(self, config: TrainConfig, source: TokenSource, processes: int) -> None:
        text, image = source.text_length, source.grid[0] * source.grid[1]
        vocabulary, size = source.vocabulary, model_size(config.model, source.vocabulary.size)
        block = config.model.get("block_length")
        pairs = block_causal_pairs(text + image, block) if block else None
        row = RowShape(text, image, vocabulary.text_size, vocabulary.image_size, 0.0, pairs)
        self._row_flops = row_flops(size, row).total  # without the head, whose share the masks decide
        self._token_flops = tuple(6.0 * size.hidden_size * n for n in (vocabulary.text_size, vocabulary.image_size))
        self._tokens, self._rows = config.rows_per_step * (text + image), config.rows_per_step
        self._peak = config.logging.peak_tflops * 1e12 * processes
        self._reset()

    def _reset(self) -> None:
        self._steps, self._seconds, self._waited, self._scored = 0, 0.0, 0.0, torch.zeros(2, dtype=torch.float64)
        self._done = 0  # tokens

    def add(self, report: StepReport, seconds: float, waited: float, tokens: int | None = None) -> None:
        """A step that took `seconds`, `waited` of them for its data.

        Args:
            tokens: of the step, over all processes, where rows have other lengths than pairs; attention is then counted as in
                as many tokens of pairs.
        """
        self._done += self._tokens if tokens is None else tokens
        self._steps, self._seconds, self._waited = self._steps + 1, self._seconds + seconds, self._waited + waited
        self._scored += report.hidden.double().sum(0)

    def take(self) -> dict[str, float]:
        """Since the last call: `tokens_per_second`; `data_wait`, the share of time without data; `tflops`, useful
        10^12 operations per second of all processes; `mfu`, their share of the peak where `logging.peak_tflops` says it."""
        if not self._steps:
            return {}
        scored = sum(n * f for n, f in zip(self._scored.tolist(), self._token_flops, strict=True))
        flops = (self._done / self._tokens * self._rows * self._row_flops + scored) / self._seconds
        out = {"tokens_per_second": self._done / self._seconds, "tflops": flops / 1e12}
        out["data_wait"] = self._waited / self._seconds
        if self._peak:
            out["mfu"] = flops / self._peak
        self._reset()
        return out


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
        if number is None:
            if line.endswith(b"\n") or not line.startswith(_OPENING[: len(line)]):  # else one of ours that was cut
                kept.append(line if line.endswith(b"\n") else line + b"\n")
            continue
        last = max(last, number)
        if number <= step:
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
    return number if isinstance(number, int) and not isinstance(number, bool) else None


class Progress:
    """Throughput and time left: a live bar on a terminal, a plain line every `every` steps elsewhere."""

    def __init__(self, steps: int, start: int, tokens_per_step: int, every: int, shown: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as Bar

        self._steps, self._tokens, self._every, self._shown = steps, tokens_per_step, every, shown
        self._seconds, self._last = 0.0, time.perf_counter()
        console = Console()
        self._bar: Bar | None = None
        if shown and console.is_terminal:
            columns = (TextColumn("train"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
            self._bar = Bar(*columns, console=console)
            self._task = self._bar.add_task("train", total=steps, completed=start, note="")
            self._bar.start()

    @property
    def seconds_per_step(self) -> float:
        return self._seconds

    def restart_clock(self) -> None:
        """Leave the time since the last step (validation, saving) out of the throughput."""
        self._last = time.perf_counter()

    def step(self, step: int, loss: float, factor: float) -> None:
        now = time.perf_counter()
        spent, self._last = now - self._last, now
        self._seconds = spent if self._seconds == 0 else 0.95 * self._seconds + 0.05 * spent
        if not self._shown:
            return
        note = (
            f"loss {loss:.4f}  lr x{factor:.3f}  {self._seconds:.3f} s/step  "
            f"{self._tokens / max(self._seconds, 1e-9):,.0f} tokens/s  left {_clock((self._steps - step) * self._seconds)}"
        )
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


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
