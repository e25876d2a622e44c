"""What an evaluation has decoded and measured, kept in a folder, so that one that was stopped goes on where it was."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from unidiff.errors import reading
from unidiff.evaluation.benchmark.measure import Cells
from unidiff.evaluation.report import Estimate
from unidiff.pipelines.batch import MANIFEST, add_to_manifest, begin_manifest
from unidiff.pipelines.sheet import save_image
from unidiff.schema import from_data


class DecodedRow(NamedTuple):
    """Words, a picture uint8 `[H, W, 3]` if one was drawn, and whether every given token came out as it went in."""

    words: str
    picture: np.ndarray | None = None
    untouched: bool = True


class KeptRows:
    """Finished rows by name, in memory and, with a folder, on the disk: `manifest.jsonl`, and a PNG file for each picture.

    Args:
        folder: where they are kept; without one nothing is. about: what they depend on.
        device: of the model, for the versions in the manifest.

    Raises:
        ValueError: a folder that holds something else, or rows that depend on something else.
    """

    def __init__(
        self,
        folder: Path | None = None,
        about: Mapping[str, Any] | None = None,
        device: object = "cpu",
    ) -> None:
        self.folder = folder
        self._lines = dict[str, _Line]()
        if folder is not None:
            entries = begin_manifest(folder, about or {}, "an evaluation", device, alone=True)
            with reading(folder / MANIFEST, "the rows of an evaluation"):
                kept = [from_data(_Line, entry, "a line") for entry in entries]
            self._lines = {line.row: line for line in kept}

    def get(self, name: str) -> DecodedRow | None:
        """A finished row, or None. Raises `ValueError`: its picture cannot be read."""
        if self.folder is None or (line := self._lines.get(name)) is None:
            return None
        picture = None
        if line.drawn:
            with reading(path := self.folder / f"{name}.png", "a kept picture"), Image.open(path) as image:
                picture = np.asarray(image.convert("RGB"))
        return DecodedRow(line.words, picture, line.untouched)

    def put(self, rows: Mapping[str, DecodedRow]) -> None:
        """Keep finished rows: first their pictures, then the lines that name them."""
        if self.folder is None:
            return
        lines = {n: _Line(n, row.words, row.untouched, row.picture is not None) for n, row in rows.items()}
        for name, row in rows.items():
            if row.picture is not None:
                save_image(Image.fromarray(row.picture), self.folder / f"{name}.png")
        add_to_manifest(self.folder, [asdict(line) for line in lines.values()])
        self._lines |= lines

    def known(self, name: str) -> bool:
        """Whether `numbers` of this name are there already."""
        return self.folder is not None and Cells(self.folder).path(name, {}).is_file()

    def numbers(self, name: str, measure: Callable[[], Mapping[str, Estimate | float]]) -> dict[str, Estimate | float]:
        """What `measure` finds, or found before."""
        if self.folder is None:
            return dict(measure())
        kept = Cells(self.folder).measured(name, {}, lambda: {key: _data(value) for key, value in measure().items()})
        return {key: value if isinstance(value, float) else _estimate(value) for key, value in kept.items()}


@dataclass(frozen=True)
class _Line:
    """A line of the manifest; `drawn`: the row's picture lies beside it, under its name."""

    row: str
    words: str
    untouched: bool
    drawn: bool


def _data(value: Estimate | float) -> Any:
    """JSON-able data that gives back the same bits."""
    if not isinstance(value, Estimate):
        return float(value)
    cases = [{"bool": part.dtype == bool, "values": part.tolist()} for part in value.cases]
    return {"value": value.value, "low": value.low, "high": value.high, "n": value.n, "cases": cases}


def _estimate(data: Mapping[str, Any]) -> Estimate:
    cases = tuple(np.array(part["values"], bool if part["bool"] else np.float64) for part in data["cases"])
    return Estimate(data["value"], data["low"], data["high"], data["n"], cases)
