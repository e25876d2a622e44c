"""What a metric of results is given, and the folder that `unidiff eval run` leaves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unidiff.errors import reading
from unidiff.evaluation.networks.base import NetworkSource
from unidiff.evaluation.suites.base import RESULTS
from unidiff.pictures import PictureSource
from unidiff.pipelines.batch import MANIFEST, read_manifest

Source = str | Path | Sequence[PictureSource]
"""A folder or file, or pictures themselves (paths, PIL images, ...)."""


@dataclass
class Results:
    """What is scored.

    Attributes:
        made: of a model. against: what it is compared with, where the metric asks for that.
        network: see `feature_network`, or the folder of a judge.
        seed: of all draws. resamples: of the bootstrap; None leaves it to the metric.
        batch_size: pictures or texts at once; numbers do not depend on it beyond rounding. device: of networks.
        tick: called with how many more are done, and of how many.
        about, notes: what a metric has to say besides its numbers, as data and as sentences.
        keys: names of the cases, by which two reports are known to be of the same.
    """

    made: Source
    against: Source | None = None
    network: NetworkSource | None = None
    seed: int = 0
    resamples: int | None = None
    batch_size: int = 32
    device: str = "cpu"
    tick: Callable[[int, int | None], None] = lambda more, total: None
    about: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)

    def path(self, which: str) -> Path:
        """`made` or `against` as a path. Raises `ValueError`: pictures in memory where a file is meant."""
        value = getattr(self, which)
        if not isinstance(value, str | Path):
            raise ValueError(f"{which} is a {type(value).__name__}; expected the name of a file or folder")
        return Path(value)


def finished_rows(folder: Path) -> list[dict[str, Any]] | None:
    """Entries of a folder of rows (`unidiff eval run`, `unidiff generate --prompts`) by number; None for another folder.

    Raises:
        ValueError: rows that are missing or were refused.
    """
    folder = folder / RESULTS if (folder / RESULTS / MANIFEST).is_file() else folder
    if not (folder / MANIFEST).is_file():
        return None
    head, entries = read_manifest(folder)
    if "rows" not in head:  # of `unidiff eval MODEL`, whose pictures are those of any folder
        return None
    found = {number: {**entry, "folder": folder} for number, entry in entries.items() if "error" not in entry}
    with reading(folder / MANIFEST, "the manifest of a batch"):
        rows = range(int(head["rows"]))
    if missing := [number for number in rows if number not in found]:
        done = len(rows) - len(missing)
        raise ValueError(f"{str(folder)!r} has {done} of {len(rows)} rows; finish the run first, with the same command")
    return [found[number] for number in rows]


def scorer_folder(folder: Path) -> Path:
    """Where a run of `unidiff eval run` put the files for a scorer; another folder itself.

    Raises:
        ValueError: a run that is not finished.
    """
    if (folder / RESULTS / MANIFEST).is_file():
        finished_rows(folder)
    return folder / "scorer" if (folder / "scorer").is_dir() else folder
