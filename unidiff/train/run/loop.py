"""The steps of a run of one process: to the last one or to a signal, with checkpoints on the way."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from unidiff.train.run.checkpoint import RunCheckpoint, save_checkpoint
from unidiff.train.run.logs import Progress, RunLog

_KEPT = 2  # checkpoints


class SteppedRun(Protocol):
    """What changes from step to step."""

    @property
    def step(self) -> int:
        """Steps taken."""

    def advance(self, log: RunLog, progress: Progress) -> None:
        """One step, after which `step` is one more; says what there is to say."""

    def checkpoint(self) -> RunCheckpoint:
        """Everything that the next step needs."""


def begin(run: SteppedRun, out: Path) -> None:
    """The checkpoint before the first step."""
    save_checkpoint(out / "checkpoints", run.checkpoint(), _KEPT)


def take_steps(run: SteppedRun, last: int, out: Path, every: int, log: RunLog, progress: Progress) -> None:
    """Step until `run.step` is `last` or a signal came; checkpoints every `every` steps and at the end.

    Args:
        out: the run's folder. log, progress: closed at the end, however it comes.
    """
    stopped: list[bool] = []
    try:
        with StopOnSignals(lambda: stopped.append(True)):
            while run.step < last and not stopped:
                run.advance(log, progress)
                if run.step % every == 0 or run.step == last or stopped:
                    save_checkpoint(out / "checkpoints", run.checkpoint(), _KEPT)
    finally:
        progress.close()
        log.close()
    if stopped and run.step < last:
        progress.say(f"stopped at step {run.step}; run the same command to go on")


class StopOnSignals:
    """While open, SIGTERM and SIGINT call `request` instead of ending the process; only in the main thread."""

    def __init__(self, request: Callable[[], None]) -> None:
        self._request = request
        self._old: dict[signal.Signals, Any] = {}

    def __enter__(self) -> None:
        def handle(number: int, frame: FrameType | None) -> None:
            self._request()

        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self._old[number] = signal.signal(number, handle)
            except ValueError:  # not the main thread: the caller owns the signals
                return

    def __exit__(self, *_: object) -> None:
        for number, old in self._old.items():
            signal.signal(number, old)
