"""Who is on the page: each has a run of their own, and the results of earlier ones."""

from __future__ import annotations

import tempfile
import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unidiff.studio import views
from unidiff.studio.runs import Finished, Run
from unidiff.studio.snippets import input_files, png

MOST_VISITORS = 200
MOST_RECORDS = 24
MOST_MEMORY = 128 * 2**20
"""Bytes of pictures that a visitor's results keep."""


@dataclass(frozen=True)
class StudioResult:
    """A finished run: what was asked for, what came out, and the way there."""

    task: str
    title: str
    model: str
    code: str
    arguments: dict[str, Any]
    done: Finished
    notes: list[str] = field(default_factory=list)

    @property
    def last(self) -> int:
        """The number of the last moment."""
        return max(0, len(self.done.moments) - 1)

    @property
    def memory(self) -> int:
        """Bytes of its pictures."""
        return sum(moment.frame.nbytes for moment in self.done.moments if moment.frame is not None)

    def stage(self, pipe: Any, number: int) -> str:
        """The moment after a pass, as HTML; a number out of range is brought to the nearest."""
        if not self.done.moments:
            return views.empty_stage("there were no passes")
        number = min(max(0, number), self.last)
        before = self.done.moments[number - 1] if number else None
        return views.stage(pipe, self.done.moments[number], self.last, before, self.title)

    @property
    def picture(self) -> Any:
        """A PIL image, or None where there is none."""
        images = self.done.out.images
        return None if images is None else images[0]

    def files(self) -> dict[str, bytes]:
        """Files to download, by name: the picture, the animation and the filmstrip, and what the code reads."""
        out, made = self.done.out, dict[str, bytes]()
        if out.images is not None:
            made["result.png"] = png(out.images[0])
        if out.trajectory is not None:
            with tempfile.TemporaryDirectory(prefix="unidiff-studio-") as folder:
                for name, save in (("result.gif", out.save_gif), ("filmstrip.png", out.save_filmstrip)):
                    save(Path(folder) / name)
                    made[name] = (Path(folder) / name).read_bytes()
        return made | input_files(self.arguments)


class Visitor:
    """One open page."""

    def __init__(self) -> None:
        self.records: list[StudioResult] = []
        self.current: StudioResult | None = None
        self.said: list[dict[str, str]] = []  # the conversation of its chat
        self.run: Run | None = None

    def begins(self, run: Run) -> None:
        """Its own run; an earlier one is left."""
        if self.run is not None:
            self.run.leave()
        self.run = run

    def keep(self, record: StudioResult) -> None:
        """Add a result, the newest first; old ones go where there are too many."""
        self.current = record
        self.records.insert(0, record)
        del self.records[MOST_RECORDS:]
        while len(self.records) > 1 and sum(own.memory for own in self.records) > MOST_MEMORY:
            self.records.pop()

    def leaves(self) -> None:
        """The page was closed."""
        if self.run is not None:
            self.run.leave()
        self.records.clear()
        self.said.clear()
        self.current = self.run = None


class Visitors:
    """All open pages, by the secret name that each has; of too many the one that was quiet longest goes."""

    def __init__(self, most: int = MOST_VISITORS) -> None:
        self._found: OrderedDict[str, Visitor] = OrderedDict()
        self._most, self._lock = most, threading.Lock()

    def of(self, name: str) -> Visitor:
        """The visitor of a page, new where it was never seen."""
        with self._lock:
            visitor = self._found.setdefault(name, Visitor())
            self._found.move_to_end(name)
            gone = [self._found.popitem(last=False)[1] for _ in range(len(self._found) - self._most)]
        for each in gone:
            each.leaves()
        return visitor

    def forget(self, name: str) -> None:
        """A page was closed: its run ends and its results go."""
        with self._lock:
            visitor = self._found.pop(name, None)
        if visitor is not None:
            visitor.leaves()

    def newest(self) -> Visitor:
        """Who was here last; `IndexError` where there is nobody."""
        with self._lock:
            return list(self._found.values())[-1]

    def __len__(self) -> int:
        return len(self._found)
