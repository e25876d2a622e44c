"""Where a run's numbers and pictures go besides its own log: TensorBoard, Weights & Biases, trackio. Imported when named."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from unidiff.files import replacing

_PACKAGES = {"tensorboard": ("TensorBoard", "train"), "wandb": ("W&B", "trackers"), "trackio": ("trackio", "trackers")}
_RUNS = "trackers.json"


class Tracker(Protocol):
    """What `unidiff.train.logs.RunLog` needs of one."""

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
    """Event files in `folder/tensorboard`."""

    def __init__(self, folder: Path, start_step: int) -> None:
        writer = _imported("tensorboard", "torch.utils.tensorboard").SummaryWriter
        self._writer = writer(str(folder / "tensorboard"), purge_step=start_step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)

    def image(self, step: int, name: str, picture: torch.Tensor) -> None:
        self._writer.add_image(name, picture, step)

    def close(self) -> None:
        self._writer.close()


class _Service:
    """W&B or trackio, whose calls are the same but for what names a run: an id there, its name here."""

    def __init__(self, name: str, folder: Path, last_step: int, project: str, about: Mapping[str, Any]) -> None:
        self._module, self._last = _imported(name, name), last_step
        title = "-".join(part for part in folder.parts if part != folder.anchor) or folder.resolve().name
        path, known = folder / _RUNS, {}
        if path.is_file():
            known = json.loads(path.read_text(encoding="utf-8"))
        old = known.get(name)
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
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(known), encoding="utf-8")

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
