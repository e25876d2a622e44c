"""SIGTERM and Ctrl-C as a request to stop after the current step."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType
from typing import Any


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
