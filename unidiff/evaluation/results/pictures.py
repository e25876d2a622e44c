"""Sets of pictures: those of a folder in the order of their names, or given ones; every kind becomes RGB and is counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unidiff.errors import plain
from unidiff.evaluation.networks.base import FeatureNetwork
from unidiff.evaluation.results.base import Source, finished_rows
from unidiff.pictures import PictureSource, as_rgb, decode_picture

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")
Tick = Callable[[int, int | None], None]


@dataclass
class PictureSet:
    """Pictures by number.

    Attributes:
        names: of each; in a folder its path from there. sources: see `open_picture`. where: for messages.
        modes, sizes: how many of those that were opened had which Pillow mode and which (width, height).
        other_files: number of files in the folder that are no pictures.
    """

    names: list[str]
    sources: list[PictureSource]
    where: str
    other_files: int = 0
    modes: Counter[str] = field(default_factory=Counter)
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)

    @classmethod
    def of(cls, source: Source, what: str) -> PictureSet:
        """The pictures of a folder (and of those in it), of finished rows, or given ones.

        Args:
            what: what they are, for messages.

        Raises:
            FileNotFoundError: no such folder. ValueError: no pictures, or rows that are not finished.
        """
        if not isinstance(source, str | Path):
            return cls([str(number) for number in range(len(source))], list(source), what).checked()
        folder = Path(source)
        if not folder.is_dir():
            state = "is a file" if folder.exists() else "does not exist"
            raise FileNotFoundError(f"{what}: {str(folder)!r} {state}; name a folder of pictures")
        if (rows := finished_rows(folder)) is not None:
            if "image" not in rows[0]:
                raise ValueError(f"{what}: the rows of {str(folder)!r} have words and no pictures")
            return cls([row["image"] for row in rows], [row["folder"] / row["image"] for row in rows], str(folder))
        files = sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))
        shown = [p for p in files if p.suffix.lower() in ENDINGS]
        names = [p.relative_to(folder).as_posix() for p in shown]
        return cls(names, list(shown), str(folder), len(files) - len(shown)).checked()

    def checked(self) -> PictureSet:
        """Itself. Raises `ValueError`: it holds nothing."""
        if not self.names:
            raise ValueError(f"{self.where!r} holds no pictures ({', '.join(ENDINGS)})")
        return self

    def __len__(self) -> int:
        return len(self.names)

    def read(self, number: int) -> Image.Image:
        """One picture in RGB, upright, transparency on white; it is counted."""
        source = self.sources[number]
        name = None if isinstance(source, str | Path) else f"picture {number}"
        image = decode_picture(source, name)
        self.modes[image.mode if not image.has_transparency_data else f"{image.mode} (transparent)"] += 1
        self.sizes[image.size] += 1
        return as_rgb(image, what=name)

    def census(self) -> dict[str, Any]:
        """What was opened, as data."""
        sizes = [f"{width}x{height}" for width, height in sorted(self.sizes)]
        found: dict[str, Any] = {"count": len(self), "modes": dict(sorted(self.modes.items()))}
        found |= {"sizes": len(sizes), "smallest": sizes[0], "largest": sizes[-1]} if sizes else {}
        return found | ({"other_files": self.other_files} if self.other_files else {})

    def remark(self) -> str | None:
        """A sentence where something was unusual."""
        said = []
        if unusual := {mode: n for mode, n in sorted(self.modes.items()) if mode != "RGB"}:
            kinds = ", ".join(f"{n} {mode}" for mode, n in unusual.items())
            said.append(f"{sum(unusual.values())} are no plain RGB and were converted ({kinds}; transparency on white)")
        if len(self.sizes) > 1:
            said.append(f"{len(self.sizes)} different sizes")
        if self.other_files:
            said.append(f"{self.other_files} other files beside them were left out")
        return f"{self.where}: of {len(self)} pictures " + "; ".join(said) if said else None

    def batches(self, batch_size: int, size: tuple[int, int] | None = None) -> Iterator[Tensor]:
        """float32 `[B, 3, H, W]` in [0, 1], in order; a batch has pictures of one size.

        Args:
            size: (height, width) to resize to, bicubic with antialiasing.
        """
        held: list[Tensor] = []
        for number in range(len(self)):
            image = self.read(number)
            if size is not None and image.size != size[::-1]:
                image = image.resize(size[::-1], Image.Resampling.BICUBIC)
            pixels = torch.from_numpy(np.array(image)).movedim(-1, 0).float() / 255
            if held and (len(held) == batch_size or held[0].shape != pixels.shape):
                yield torch.stack(held)
                held = []
            held.append(pixels)
        yield torch.stack(held)


def extract(pictures: PictureSet, network: FeatureNetwork, part: str, batch_size: int, tick: Tick) -> Tensor:
    """Features or logits (`part`) of every picture, float64 `[N, D]` on the CPU.

    Raises:
        ValueError: a network without logits, or one that gives another shape or numbers that are not finite.
    """
    call = getattr(network, part)
    if call is None:
        raise ValueError(f"the network {network.name} knows no classes; give one with {part}")
    rows: list[Tensor] = []
    tick(0, len(pictures))
    for batch in pictures.batches(batch_size, network.size):
        first = pictures.names[sum(map(len, rows))]
        try:
            with torch.inference_mode():
                found = call(batch)
        except ValueError as error:
            raise ValueError(f"{plain(first)!r} of {pictures.where!r}: {error}") from error
        if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != len(batch):
            shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"the network {network.name} gives {shape} for {len(batch)} pictures; expected [B, D]")
        if not found.isfinite().all():
            raise ValueError(f"the network {network.name} gives {part} that are not finite for {pictures.where!r}")
        if rows and found.shape[1] != rows[0].shape[1]:
            raise ValueError(
                f"the network {network.name} gives {found.shape[1]} {part} for pictures of {list(batch.shape[2:])} and "
                f"{rows[0].shape[1]} before; give it a size"
            )
        rows.append(found.double().cpu())
        tick(len(batch), len(pictures))
    return torch.cat(rows)
