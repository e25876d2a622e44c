"""Other programs beside ours: the same weights, the same decode, in turn; whether tokens are equal, and the times.

Their code is imported from a folder that a person names, and runs: name only what you would run yourself.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import ModuleType

import torch
from rich.table import Table
from torch import Tensor

from unidiff.errors import first_line
from unidiff.evaluation.report import table_of
from unidiff.process import timed

Program = Callable[[], Tensor]


@dataclass(frozen=True)
class Sizes:
    """Of models and rows: `width` to `ffn` of the network, ids, tokens, passes of a block (text) and of a picture."""

    width: int = 512
    layers: int = 8
    heads: int = 8
    ffn: int = 1408
    text_ids: int = 8192
    image_ids: int = 4096
    prompt: int = 64
    answer: int = 128
    block: int = 32
    passes: int = 16
    grid: int = 16
    steps: int = 32  # no multiple of 3: where cos(pi/3) is met, Lumina's float32 gives one token fewer


@dataclass(frozen=True)
class Pair:
    """One decode by two programs, each a call that gives its tokens (int64)."""

    name: str
    theirs: Program
    ours: Program


@dataclass(frozen=True)
class PeerSystem:
    """Another program.

    Args:
        name: for people. marks: files by which a checkout of it is known.
        roots: folders of the checkout, from which its modules are imported; those that are there count.
        pairs: (folder, sizes, device) -> what is compared. It runs where modules of `roots` can be imported.
    """

    name: str
    marks: tuple[str, ...]
    roots: tuple[str, ...]
    pairs: Callable[[Path, Sizes, torch.device], Iterator[Pair]]


@dataclass(frozen=True)
class PeerTiming:
    """What came of a pair.

    Attributes:
        differing: tokens that are not the same, of how many. theirs, ours: median seconds.
        times: their seconds over ours, median of paired runs; least, most: of these.
        skipped: why it was not measured, in a sentence; else empty.
    """

    name: str
    skipped: str = ""
    differing: int = 0
    tokens: int = 0
    theirs: float = 0.0
    ours: float = 0.0
    times: float = 0.0
    least: float = 0.0
    most: float = 0.0


def compare(
    folder: Path,
    systems: Sequence[PeerSystem],
    device: torch.device,
    runs: int = 5,
    sizes: Sizes | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[str, list[PeerTiming]]:
    """The system's name, and each of its decodes against ours. What cannot be imported or run is skipped with a reason.

    Raises:
        ValueError: no folder, or no checkout of a known system.
    """
    if not folder.is_dir():
        raise ValueError(f"{str(folder)!r} is no folder; give a checkout of {_names(systems)}")
    system = next((s for s in systems if any((folder / mark).is_file() for mark in s.marks)), None)
    if system is None:
        raise ValueError(f"{str(folder)!r} is no checkout of {_names(systems)}; none of their files is there")
    found, folder = list[PeerTiming](), folder.resolve()
    with importing([place for root in system.roots if (place := folder / root).is_dir()]):
        pairs = system.pairs(folder, sizes or Sizes(), device)
        while True:
            try:
                pair = next(pairs, None)
            except Exception as error:  # theirs, of any kind
                return system.name, [*found, PeerTiming("all" if not found else "the rest", _reason(error))]
            if pair is None:
                return system.name, found
            say(f"{system.name}: {pair.name}")
            try:
                found.append(_measured(pair, device, runs))
            except Exception as error:
                found.append(PeerTiming(pair.name, _reason(error)))


def _measured(pair: Pair, device: torch.device, runs: int) -> PeerTiming:
    theirs, ours = pair.theirs().cpu(), pair.ours().cpu()  # the warm-up
    if theirs.shape != ours.shape:
        raise ValueError(f"their tokens have shape {tuple(theirs.shape)}, ours {tuple(ours.shape)}")
    if len(theirs.unique()) < 2:
        raise ValueError("their tokens are all the same, which shows nothing")
    seconds: dict[Program, list[float]] = {pair.theirs: [], pair.ours: []}
    for run in range(runs):
        for program in list(seconds)[:: 1 if run % 2 else -1]:
            seconds[program].append(spent(program, device))
    a, b = seconds.values()
    times = [x / y for x, y in zip(a, b, strict=True)]
    differing = int((theirs != ours).sum())
    return PeerTiming(
        pair.name, "", differing, ours.numel(), median(a), median(b), median(times), min(times), max(times)
    )


def spent(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call: on a CPU the processor's, which other programs of the machine disturb less than a clock."""
    if device.type != "cpu":
        return timed(work, device)[1]
    begun = time.process_time()
    work()
    return time.process_time() - begun


@contextmanager
def importing(folders: Sequence[Path]) -> Iterator[None]:
    """Inside, modules of these folders can be imported; afterwards they are forgotten."""
    before, path = set(sys.modules), list(sys.path)
    sys.path[:0] = map(str, folders)
    try:
        yield
    finally:
        loaded = {name: sys.modules[name] for name in set(sys.modules) - before}
        for name in [name for name, module in loaded.items() if _lies_in(module, folders)]:
            del sys.modules[name]
        sys.path[:] = path


def _lies_in(module: ModuleType, folders: Sequence[Path]) -> bool:
    places = [getattr(module, "__file__", None), *getattr(module, "__path__", ())]
    return any(place and Path(place).is_relative_to(folder) for place in places for folder in folders)


def comparison_table(system: str, found: Sequence[PeerTiming], about: str) -> Table:
    """For people."""
    table = table_of(
        f"{system}: {about}", "decode", "tokens", "theirs, s", "ours, s", "times as fast", "of the runs", left=2
    )
    for c in found:
        same = "equal" if not c.differing else f"{c.differing} of {c.tokens} differ"
        numbers = (f"{c.theirs:.3g}", f"{c.ours:.3g}", f"{c.times:.2f}", f"{c.least:.2f} to {c.most:.2f}")
        table.add_row(c.name, *((c.skipped, "", "", "", "") if c.skipped else (same, *numbers)))
    return table


def _reason(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"skipped: it needs the package {error.name!r}, which is not installed"
    return f"skipped: {type(error).__name__}: {first_line(error)}"


def _names(systems: Sequence[PeerSystem]) -> str:
    return ", ".join(s.name for s in systems[:-1]) + f" or {systems[-1].name}"
