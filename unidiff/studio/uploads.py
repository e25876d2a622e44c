"""Pictures that people send: what is accepted, how large, and the model's size of them.

A file is told by its first bytes (`unidiff.pictures.FORMATS`), never by its name, and only what the server stored itself is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from unidiff.errors import DamagedFile
from unidiff.pictures import decode_picture, open_picture
from unidiff.pipelines.inputs import fit_white

MAX_BYTES = 8 * 2**20
"""Largest file."""
MAX_PIXELS = 16_000_000
"""Largest picture that is decoded; a small file can claim to be much more."""
MOST_LAYERS = 8
_NAME = "the picture"


@dataclass(frozen=True)
class Sent:
    """What a form holds of a picture: files as bytes, and what was wrong with them.

    Args:
        picture: None for none. layers: what was painted over it. fault: a sentence, "" for none.
    """

    picture: bytes | None = None
    layers: tuple[bytes, ...] = ()
    fault: str = ""

    def opened(self, pipe: Any) -> tuple[Image.Image | None, Image.Image | None]:
        """Picture and mask at the model's size; `ValueError` where something is wrong."""
        if self.fault:
            raise DamagedFile(self.fault)
        if self.picture is None:
            return None, None
        picture = sent_picture(self.picture)
        return fitted(picture, pipe), fitted_mask(brushed(self.layers), picture, pipe)


def stored_bytes(path: str | Path, folder: str | Path) -> bytes:
    """Content of a file in the server's own `folder`.

    Raises:
        ValueError: it lies somewhere else, wherever links lead, is no plain file, or has more than `MAX_BYTES`.
    """
    place, inside = Path(path).resolve(), Path(folder).resolve()
    if inside not in place.parents or not place.is_file():
        raise ValueError(f"{_NAME} was not sent to this server, or is gone; choose it again")
    with place.open("rb") as file:
        return _bounded(file.read(MAX_BYTES + 1))


def sent_picture(data: bytes) -> Image.Image:
    """A sent file as a picture in RGB, upright.

    Raises:
        DamagedFile: too many bytes or pixels, or no whole picture of the `FORMATS`.
    """
    return open_picture(_bounded(data), _NAME, max_pixels=MAX_PIXELS)


def brushed(layers: Sequence[bytes]) -> np.ndarray | None:
    """bool `[h, w]`: what was painted on any layer, a picture each, transparent where nothing was; None for nothing painted.

    Raises:
        DamagedFile: as of `sent_picture`, layers of different sizes, or too many.
    """
    if len(layers) > MOST_LAYERS:
        raise DamagedFile(f"the painting has {len(layers)} layers; expected at most {MOST_LAYERS}")
    painted: np.ndarray | None = None
    for data in layers:
        layer = decode_picture(_bounded(data), "the painting", max_pixels=MAX_PIXELS)
        alpha = np.asarray(layer.convert("RGBA").getchannel("A")) >= 128
        if painted is not None and painted.shape != alpha.shape:
            raise DamagedFile("the layers of the painting differ in size; clear it and paint again")
        painted = alpha if painted is None else painted | alpha
    return painted if painted is not None and painted.any() else None


def fitted(picture: Image.Image, pipe: Any) -> Image.Image:
    """The picture at the size that the model takes: scaled to cover it, the centre kept.

    A picture whose pixels were repeated to make it larger comes back exactly. As it is where the model reads any.
    """
    if pipe.layout.reads_pixels:
        return picture
    height, width = model_size(picture, pipe)
    if picture.size == (width, height):
        return picture
    shrinks = picture.width >= width and picture.height >= height
    return ImageOps.fit(picture, (width, height), Image.Resampling.BOX if shrinks else Image.Resampling.BICUBIC)


def fitted_mask(painted: np.ndarray | None, picture: Image.Image, pipe: Any) -> Image.Image | None:
    """White where to repaint, at the model's size: wherever a pixel covers any that was painted; None for nothing.

    Args:
        painted: bool `[h, w]` of the size of `picture`, or of its proportions.

    Raises:
        ValueError: all of it lies outside of the centre that is kept.
    """
    if painted is None:
        return None
    if painted.shape != (picture.height, picture.width):
        resized = Image.fromarray(painted).resize(picture.size, Image.Resampling.NEAREST)
        painted = np.asarray(resized)
    size = model_size(picture, pipe)
    white = painted if painted.shape == size else fit_white(painted, size, "the painting")
    return Image.fromarray(np.where(white, np.uint8(255), np.uint8(0)))


def model_size(picture: Image.Image, pipe: Any) -> tuple[int, int]:
    """(height, width) in pixels that the model takes for a picture."""
    if not pipe.layout.any_size:
        return pipe.image_size
    factor, grid = pipe.images.factor, pipe.layout.fit(picture.height, picture.width)
    return grid[0] * factor, grid[1] * factor


def _bounded(data: bytes) -> bytes:
    if len(data) > MAX_BYTES:
        raise DamagedFile(f"the file is larger than {MAX_BYTES // 2**20} MB; make the picture smaller")
    return data
