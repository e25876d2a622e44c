"""A decode that is watched: it runs in the background, tells what it sees after each pass, and can be stopped or left.

All decodes of a model run one after the other in one thread, so that people never wait on each other's weights and nothing mixes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any

import torch
from torch import Tensor

from unidiff.pipelines.decode import candidate_seeds, row_seeds
from unidiff.pipelines.options import CALLBACK_TENSORS
from unidiff.pipelines.output import UniDiffOutput, to_frames

EVERY = 0.12
"""Seconds between two previews, at least."""
SHARE = 0.2
"""Most of the time that previews may take from a decode."""


MOST_WAITING = 16


@dataclass(frozen=True)
class Moment:
    """A row of L tokens after a pass, on the CPU; the picture has h x w codes, 0 x 0 where there is none."""

    number: int  # of the pass, from 1; 0 before the first
    ids: Tensor  # int64 [L]
    open: Tensor  # bool [L], still masked
    confidence: Tensor  # float32 [L]
    recomputed: Tensor  # bool [L], what the cache had computed anew
    targets: Tensor  # bool [L], what is decoded
    words: Tensor  # bool [L], what the text is read from
    picture: Tensor  # int64 [h, w], places of the codes in the row
    frame: Any = None  # uint8 [H, W, 3], open codes in grey; None where it is not drawn


@dataclass(frozen=True)
class Finished:
    """The end of a run.

    Args:
        moments: of the row that is given back, before the first pass and after each. candidate: which of `count` it was.
        stopped: the number of the pass after which a person stopped it; None where nobody did.
    """

    out: UniDiffOutput
    moments: list[Moment]
    candidate: int = 0
    count: int = 1
    stopped: int | None = None


@dataclass(frozen=True)
class Failed:
    """A run that ended with an error."""

    error: Exception


class _Left(Exception):
    """Nobody waits for the result any more."""


class Run:
    """One call of a task.

    Args:
        pipe: the pipeline. task: a method of it. arguments: for that, of one row.
        previews: whether moments on the way are drawn.
    """

    def __init__(self, pipe: Any, task: str, arguments: Mapping[str, Any], previews: bool = True) -> None:
        self.pipe, self.task, self.arguments, self.previews = pipe, task, dict(arguments), previews
        self.news: SimpleQueue[Moment | Finished | Failed] = SimpleQueue()
        self._stop, self._left, self.begun = threading.Event(), threading.Event(), threading.Event()
        self._passes: list[dict[str, Tensor]] = []
        self._stopped: int | None = None
        self._last = self._cost = 0.0

    def stop(self) -> None:
        """After the pass that runs now, the rest is filled in one last pass."""
        self._stop.set()

    def leave(self) -> None:
        """End it as soon as possible, without a result."""
        self._left.set()

    @property
    def left(self) -> bool:
        """Whether nobody waits for it."""
        return self._left.is_set()

    def events(self, patience: float = 0.5) -> Iterator[Moment | Finished | Failed | None]:
        """What happens, the newest moment only where several wait; None after `patience` seconds of nothing. Ends with the run.

        Whoever stops listening leaves the run.
        """
        try:
            while True:
                try:
                    found = self.news.get(timeout=patience)
                    while isinstance(found, Moment) and not self.news.empty():
                        found = self.news.get()
                except Empty:
                    yield None
                    continue
                yield found
                if not isinstance(found, Moment):
                    return
        finally:
            self.leave()

    def decode(self) -> None:
        """Do it, in whatever thread this is called; all that is raised becomes news."""
        if self.left:
            return
        self.begun.set()
        try:
            out = getattr(self.pipe, self.task)(
                **self.arguments,
                record_trajectory=True,
                callback_on_step_end=self._look,
                callback_on_step_end_tensor_inputs=list(CALLBACK_TENSORS),
            )
            self.news.put(self._finished(out))
        except _Left:
            pass
        except Exception as error:  # whatever it is, the page says it
            self.news.put(Failed(error))
        except BaseException as error:  # of a library in another language: the page must not wait for ever
            self.news.put(Failed(RuntimeError(f"{type(error).__name__}: {error}")))

    def _look(self, pipe: Any, step: int, t: float, tensors: Mapping[str, Tensor]) -> bool | None:
        if self.left:
            raise _Left
        self._passes.append({name: tensor.cpu() for name, tensor in tensors.items()})
        begun = time.monotonic()
        if self.previews and begun - self._last >= max(EVERY, self._cost / SHARE):
            self.news.put(self._moment(len(self._passes), 0, self._frame))
            self._last = time.monotonic()
            self._cost = self._last - begun
        if self._stop.is_set() and self._stopped is None and t > 0:
            self._stopped = len(self._passes)
            return False
        return None

    def _moment(self, number: int, row: int, frame: Any = None) -> Moment:
        """`frame`: a picture, or what draws it of a moment without."""
        kept = self._passes[max(number, 1) - 1]
        moment = Moment(number, **{name: tensor[row] for name, tensor in kept.items()})
        if number == 0:  # all that is decoded is open, and nothing was computed
            nothing = torch.zeros_like(moment.open)
            moment = Moment(0, moment.ids, moment.targets, (~moment.targets).float(), nothing, *_places(moment))
        return Moment(**{**vars(moment), "frame": frame(moment) if callable(frame) else frame})

    def _frame(self, moment: Moment) -> Any:
        """uint8 `[H, W, 3]`: the picture so far; where it is open, the decoder sees the commonest code around it."""
        if not moment.picture.numel():
            return None
        codes = moment.ids[moment.picture] - self.pipe.vocabulary.image[0]  # [h, w]
        hidden = moment.open[moment.picture]
        if bool(hidden.all()):
            codes = torch.zeros_like(codes)
        elif bool(hidden.any()):
            codes = torch.where(hidden, codes[~hidden].mode().values, codes)
        with torch.no_grad():
            images = self.pipe.images.preview(codes[None].to(self.pipe.transformer.device), 0).cpu()
        return to_frames(images, hidden[None])[0].numpy()

    def _finished(self, out: UniDiffOutput) -> Finished:
        rows = len(self._passes[0]["ids"]) if self._passes else 1
        seeds = candidate_seeds(row_seeds(self.arguments.get("generator"), 1), rows)
        row = int((seeds == out.seeds[0]).long().argmax())
        frames = out.trajectory.frames if out.trajectory is not None else None  # [S, 1, H, W, 3]
        moments = [
            self._moment(number, row, None if frames is None else frames[number, 0].numpy())
            for number in range(len(self._passes) + 1 if self._passes else 0)
        ]
        return Finished(out, moments, row, rows, self._stopped)


def _places(moment: Moment) -> tuple[Tensor, Tensor, Tensor]:
    return moment.targets, moment.words, moment.picture


class Worker:
    """The thread in which the decodes of one model run, one after the other, and the line in front of it.

    Args:
        most: runs that may wait.
    """

    def __init__(self, most: int = MOST_WAITING) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="unidiff-studio")
        self._most, self._line, self._lock = most, list[Run](), threading.Lock()

    def start(self, run: Run) -> Run:
        """Run it when those before it are done, or have left.

        Raises:
            ValueError: too many wait already.
        """
        with self._lock:
            if len(self._waiting()) >= self._most:
                raise ValueError(f"{self._most} people are waiting already; try again in a minute")
            self._line.append(run)
        self._thread.submit(self._do, run)
        return run

    def before(self, run: Run) -> int:
        """How many runs wait or work in front of it; 0 once it works."""
        with self._lock:
            line = [each for each in self._line if not each.left]
            return line.index(run) if run in line else 0

    def close(self) -> None:
        """Take no more, and end what runs."""
        with self._lock:
            for run in self._line:
                run.leave()
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _waiting(self) -> list[Run]:
        return [run for run in self._line if not run.left and not run.begun.is_set()]

    def _do(self, run: Run) -> None:
        try:
            run.decode()
        finally:
            with self._lock:
                self._line.remove(run)
