"""Where a run's numbers and pictures go besides its own log: TensorBoard, Weights & Biases, trackio. Imported when named."""

from __future__ import annotations

import importlib
import itertools
import json
import os
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from unidiff.errors import read_json, writing
from unidiff.files import replace_text

_PACKAGES = {"tensorboard": ("TensorBoard", "train"), "wandb": ("W&B", "trackers"), "trackio": ("trackio", "trackers")}
_RUNS = "trackers.json"
_NUMBERS = itertools.count()  # of event files of this process


class Tracker(Protocol):
    """What `unidiff.train.run.logs.RunLog` needs of one."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Finite numbers of a step."""

    def image(self, step: int, name: str, picture: torch.Tensor) -> None:
        """A uint8 `[3, H, W]` picture."""

    def close(self) -> None:
        """All is sent when this returns."""


def open_trackers(
    names: Sequence[str], folder: Path, start_step: int, last_step: int, project: str, about: Mapping[str, Any]
) -> list[Tracker]:
    """The named trackers of the run in `folder`; one that was killed goes on in the same W&B or trackio run.

    Args:
        names: of `unidiff.train.config.TRACKERS`.
        start_step: the run continues after this step.
        last_step: steps up to this one were sent before it was killed. TensorBoard forgets them, the others keep them and
            get nothing twice.
        project: in W&B and trackio; the run there is named after the folder.
        about: the settings, shown next to the run.

    Raises:
        ValueError: a package is not installed, or a service does not start (no login, for instance).
    """
    trackers: list[Tracker] = []
    for name in names:
        if name == "tensorboard":
            trackers.append(_TensorBoard(folder, start_step))
        else:
            trackers.append(_Service(name, folder, last_step, project, about))
    return trackers


class _TensorBoard:
    """An event file in `folder/tensorboard`.

    Written event by event: `SummaryWriter` writes in a thread, whose errors (a full disk) are a traceback and no sentence.
    """

    def __init__(self, folder: Path, start_step: int) -> None:
        self._summary = _imported("tensorboard", "torch.utils.tensorboard").summary
        self._events = _imported("tensorboard", "tensorboard.compat.proto.event_pb2")
        records = _imported("tensorboard", "tensorboard.summary.writer.record_writer")
        name = (
            f"events.out.tfevents.{time.time_ns() // 10**9:010d}.{socket.gethostname()}.{os.getpid()}.{next(_NUMBERS)}"
        )
        self.path = folder / "tensorboard" / name
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "wb")  # noqa: SIM115 (closed by close)
        self._writer = records.RecordWriter(self._file)
        start = self._events.SessionLog(status=self._events.SessionLog.START)
        self._write(start_step + 1, file_version="brain.Event:2")
        self._write(
            start_step + 1, session_log=start
        )  # events of steps from here on that a killed run left are dropped

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
        if name == "wandb":
            named: dict[str, Any] = {"name": title, "id": old, "dir": str(folder)}
        else:
            named = {"name": old or title}
        try:
            self._run = self._module.init(
                project=project, config=dict(about), resume="allow" if old else "never", **named
            )
        except Exception as error:  # each service has errors of its own
            reason = " ".join(str(error).split())[:300]
            raise ValueError(
                f"{name} did not start ({reason}); log in there, or leave {name} out of the trackers"
            ) from error
        known[name] = self._run.id if name == "wandb" else self._run.name
        replace_text(path, json.dumps(known))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        if step > self._last:
            self._run.log(dict(values), step=step)

    def image(self, step: int, name: str, picture: torch.Tensor) -> None:
        if step > self._last:
            pixels = picture.permute(1, 2, 0).cpu().numpy()  # [H, W, 3]
            self._run.log({name: self._module.Image(pixels)}, step=step)

    def close(self) -> None:
        self._run.finish()


def _imported(name: str, module: str) -> Any:
    title, extra = _PACKAGES[name]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(
            f"{title} is not installed; run pip install 'unidiff[{extra}]' or leave {name} out of the trackers"
        ) from error
