"""What rows a transformer was trained on, written beside its weights, so that nobody has to remember it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from unidiff.errors import read_json
from unidiff.schema import check_fields, from_data

FILE = "trained_on.json"
TASKS = ("generate", "text_to_image", "caption", "answer", "text")
"""Tasks of training: those of a pipeline, and captions alone. Documents are trained on as `generate` is."""
FORMER_TASKS = {"joint": "generate", "t2i": "text_to_image", "vqa": "answer"}
"""What records of older runs call them."""


@dataclass(frozen=True)
class TrainedOn:
    """The rows of a training run.

    Args:
        grid: image codes per column and per row, `(height, width)`.
        text_length: tokens of the text span.
        tasks: of `TASKS`, those that took part, in that order.

    Raises:
        ValueError: a value of another type or outside its range.
    """

    grid: tuple[int, int]
    text_length: int
    tasks: tuple[str, ...]

    def __post_init__(self) -> None:
        check_fields(self, "training's")
        if min(self.grid) < 1 or self.text_length < 1:
            raise ValueError(f"training's grid {self.grid} and text_length {self.text_length} must be positive")
        if unknown := sorted(set(self.tasks) - set(TASKS)):
            raise ValueError(f"training's tasks name unknown {unknown}; expected some of {list(TASKS)}")
        object.__setattr__(self, "tasks", tuple(task for task in TASKS if task in self.tasks))

    def save(self, folder: str | Path, started_from: str | Path | None = None) -> None:
        """Write `trained_on.json` into a folder that is being filled.

        Args:
            started_from: folder of the weights that training went on from; the tasks that they know already count too.

        Raises:
            ValueError: `started_from` holds a damaged `trained_on.json`.
        """
        before = read_trained_on(started_from) if started_from else None
        values = asdict(self) | {"tasks": (self if before is None else self.with_tasks(before.tasks)).tasks}
        (Path(folder) / FILE).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")

    def with_tasks(self, more: Iterable[str]) -> TrainedOn:
        """The same with further tasks."""
        return TrainedOn(self.grid, self.text_length, (*self.tasks, *more))


def read_trained_on(folder: str | Path) -> TrainedOn | None:
    """What a run wrote beside its model; None where it wrote nothing (older runs, models from elsewhere).

    Raises:
        ValueError: a damaged file.
    """
    path = Path(folder) / FILE
    if not os.path.lexists(path):  # a link that leads nowhere is damage
        return None
    values = read_json(path, "a record of training")
    try:
        if isinstance(tasks := values.get("tasks"), list):
            values["tasks"] = [FORMER_TASKS.get(task, task) if isinstance(task, str) else task for task in tasks]
        return from_data(TrainedOn, values, "it")
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is no record of training ({error}); export the model again") from error
