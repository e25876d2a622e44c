"""What a run says while it goes (JSON lines, trackers, one progress line), and the steps of a run of one process."""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch

from unidiff.errors import first_line, import_extra, read_json, reading, writing
from unidiff.files import replace_text, replacing
from unidiff.train.run.checkpoint import RunCheckpoint, save_checkpoint
from unidiff.train.run.report import REPORT, write_report


class RunLog:
    """`metrics.jsonl` in the run's folder, one object per line with `step`, the trackers, and `report.html`, which is written
    anew every minute at most and at the end.

    Args:
        start_step: lines of later steps, left by a killed run, are dropped. TensorBoard forgets them too; W&B and trackio
            keep them and get nothing twice.
        trackers: where else numbers and pictures go, names of `unidiff.train.config.TRACKERS`.
        project: in W&B and trackio; the run there is named after the folder, and a killed one goes on in the same.
        about: the run's settings, for the trackers that show them.
        report: whether to write `report.html`.
        silent: write nothing (all processes of a run but one).

    Raises:
        ValueError: a tracker is not installed, or does not start (no login, for instance).
    """

    def __init__(
        self,
        folder: Path,
        start_step: int,
        trackers: Sequence[str] = (),
        project: str = "unidiff",
        about: Mapping[str, Any] | None = None,
        silent: bool = False,
        report: bool = True,
    ) -> None:
        self._about, self._report, self._report_due = (
            about or {},
            report and not silent,
            time.monotonic() + _REPORT_EVERY,
        )
        self.path = folder / "metrics.jsonl"
        self._file: BinaryIO | None = None
        self._trackers: list[_TensorBoard | _Service] = []
        if silent:
            return
        last = _truncate(self.path, start_step)
        for name in trackers:
            if name == "tensorboard":
                self._trackers.append(_TensorBoard(folder, start_step))
            else:
                self._trackers.append(_Service(name, folder, last, project, about or {}))
        with writing(self.path):
            self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 (closed by close)

    def write(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        """One line `{"step", "kind", "time", **values}`; numbers that are not finite become null.

        Trackers get the finite ones, named `kind/key`. Raises OSError where the disk is full and the like; the file then
        ends with its last whole line.
        """
        if self._file is None:
            return
        plain = {k: v if math.isfinite(v) else None for k, v in values.items()}
        line = {"step": step, "kind": kind, "time": round(time.time(), 2), **plain}
        with writing(self.path):
            _append(self._file, (json.dumps(line) + "\n").encode())
        for tracker in self._trackers:
            tracker.write(step, {f"{kind}/{key}": value for key, value in plain.items() if value is not None})
        if time.monotonic() > self._report_due:
            self._write_report()

    def image(self, step: int, name: str, picture: torch.Tensor) -> None:
        """A uint8 `[3, H, W]` picture for the trackers."""
        for tracker in self._trackers:
            tracker.image(step, name, picture)

    def flush(self) -> None:
        """Wait until all lines are on the disk: a checkpoint is never newer than the log of its steps."""
        if self._file is not None:
            with writing(self.path):
                os.fsync(self._file.fileno())

    def _write_report(self) -> None:
        """What goes wrong here ends no run: the page shows what other files hold."""
        began = time.monotonic()
        if self._report and self.path.stat().st_size:
            try:
                write_report(self.path.parent, self._about)
            except Exception as error:
                _LOG.warning("%s cannot be written (%s)", self.path.with_name(REPORT), first_line(error))
        spent = time.monotonic() - began
        self._report_due = time.monotonic() + max(_REPORT_EVERY, 50 * spent)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._write_report()
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


_LOG = logging.getLogger(__name__)
_REPORT_EVERY = 60.0  # seconds, and fifty times what it takes
_OPENING = b'{"step": '  # of every line that a run writes


def _truncate(path: Path, step: int) -> int:
    """Drop the lines of steps after `step`, which come again, and a last line that was cut; what is no line of a run stays.
    Returns the last step there was."""
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


_PACKAGES = {"tensorboard": ("TensorBoard", "train"), "wandb": ("W&B", "trackers"), "trackio": ("trackio", "trackers")}
_RUNS = "trackers.json"
_NUMBERS = itertools.count()  # of event files of this process


class _TensorBoard:
    """An event file in `folder/tensorboard`.

    Written event by event: `SummaryWriter` writes in a thread, whose errors (a full disk) are a traceback and no sentence.
    """

    def __init__(self, folder: Path, start_step: int) -> None:
        self._summary = _imported("tensorboard", "torch.utils.tensorboard").summary
        self._events = _imported("tensorboard", "tensorboard.compat.proto.event_pb2")
        records = _imported("tensorboard", "tensorboard.summary.writer.record_writer")
        made = f"{time.time_ns() // 10**9:010d}.{socket.gethostname()}.{os.getpid()}.{next(_NUMBERS)}"
        self.path = folder / "tensorboard" / f"events.out.tfevents.{made}"
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "wb")  # noqa: SIM115 (closed by close)
        self._writer = records.RecordWriter(self._file)
        self._write(start_step + 1, file_version="brain.Event:2")
        # events of steps from here on that a killed run left are dropped
        start = self._events.SessionLog(status=self._events.SessionLog.START)
        self._write(start_step + 1, session_log=start)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            self._write(step, summary=self._summary.scalar(key, value))

    def image(self, step: int, name: str, picture: torch.Tensor) -> None:
        self._write(step, summary=self._summary.image(name, picture, dataformats="CHW"))

    def _write(self, step: int, **content: Any) -> None:
        with writing(self.path):
            self._writer.write(self._events.Event(wall_time=time.time(), step=step, **content).SerializeToString())
            self._writer.flush()

    def close(self) -> None:
        with writing(self.path):
            self._file.close()


class _Service:
    """W&B or trackio, whose calls are the same but for what names a run: an id there, its name here."""

    def __init__(self, name: str, folder: Path, last_step: int, project: str, about: Mapping[str, Any]) -> None:
        self._module, self._last = _imported(name, name), last_step
        title = "-".join(part for part in folder.parts if part != folder.anchor) or folder.resolve().name
        path = folder / _RUNS
        known = read_json(path, "the names of a run in trackers") if path.is_file() else {}
        old = known.get(name)
        if not isinstance(old, str | None):
            raise ValueError(f"{str(path)!r} is damaged: {name} is {old!r}; delete it to begin a new run there")
        named = {"name": title, "id": old, "dir": str(folder)} if name == "wandb" else {"name": old or title}
        resume = "allow" if old else "never"
        try:
            self._run = self._module.init(project=project, config=dict(about), resume=resume, **named)
        except Exception as error:  # each service has errors of its own
            reason = " ".join(str(error).split())[:300]
            raise ValueError(
                f"{name} did not start ({reason}); log in there, or leave {name} out of the trackers"
            ) from error
        known[name] = self._run.id if name == "wandb" else self._run.name
        replace_text(path, json.dumps(known))

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        if step > self._last:
            self._run.log(dict(values), step=step)

    def image(self, step: int, name: str, picture: torch.Tensor) -> None:
        self.write(step, {name: self._module.Image(picture.permute(1, 2, 0).cpu().numpy())})  # [H, W, 3]

    def close(self) -> None:
        self._run.finish()


def _imported(name: str, module: str) -> Any:
    title, extra = _PACKAGES[name]
    said = f"{title} is not installed; run pip install 'unidiff[{extra}]' or leave {name} out of the trackers"
    return import_extra(module, said)


_KEPT = 2  # checkpoints


class SteppedRun(Protocol):
    """A run of one process: what changes from step to step."""

    @property
    def step(self) -> int:
        """Steps taken."""

    def advance(self, log: RunLog, progress: Progress) -> None:
        """One step, after which `step` is one more; says what there is to say."""

    def checkpoint(self) -> RunCheckpoint:
        """Everything that the next step needs."""


class Agreeing(Protocol):
    """Processes that step together, as `unidiff.train.run.distributed.Parallel`."""

    @property
    def main(self) -> bool: ...

    def agree(self, *flags: bool) -> tuple[bool, ...]: ...


def begin(run: SteppedRun, out: Path) -> None:
    """The checkpoint before the first step."""
    save_checkpoint(out / "checkpoints", run.checkpoint(), _KEPT)


def take_steps(
    run: SteppedRun, last: int, out: Path, every: int, log: RunLog, progress: Progress, together: Agreeing | None = None
) -> None:
    """Step until `run.step` is `last` or a signal came; checkpoints every `every` steps and at the end.

    Args:
        out: the run's folder. log, progress: closed at the end, however it comes. together: processes that take the same
            steps, of which the main one writes.
    """
    with closing(log), closing(progress), stop_on_signals() as asked:
        stopped = False
        while run.step < last and not stopped:
            run.advance(log, progress)
            stopped = bool(asked) if together is None else together.agree(bool(asked))[0]
            if together is not None and not together.main:
                continue
            if run.step % every == 0 or run.step == last or stopped:
                save_checkpoint(out / "checkpoints", run.checkpoint(), _KEPT)
    if stopped and run.step < last:
        progress.say(f"stopped at step {run.step}; run the same command to go on")


@contextmanager
def stop_on_signals() -> Iterator[list[int]]:
    """Inside, SIGTERM and SIGINT are added to the list instead of ending the process; only in the main thread."""
    asked: list[int] = []
    main = threading.current_thread() is threading.main_thread()  # in others the caller owns the signals
    old = {n: signal.signal(n, lambda number, _: asked.append(number)) for n in (signal.SIGTERM, signal.SIGINT) if main}
    try:
        yield asked
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
