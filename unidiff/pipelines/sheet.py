"""Sheets of pictures with words under them, drawn with Pillow alone, and files that appear complete or not at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from unidiff.files import replacing

_PICTURES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
_ANIMATED = {".gif": "GIF"}
GAP = 12
INK, PAPER, QUIET = (28, 30, 36), (255, 255, 255), (110, 114, 124)


@dataclass(frozen=True)
class Cell:
    """Pictures next to each other (or none), a heading above, a text below and a note in grey below that."""

    images: tuple[Image.Image, ...]
    text: str = ""
    note: str = ""
    heading: str = ""


def draw_sheet(
    rows: Sequence[Sequence[Cell]], side: int = 128, title: str = "", font_size: int = 13, width: int = 0
) -> Image.Image:
    """Cells in lines, each picture scaled to a width of `side` pixels; small ones keep their pixels sharp.

    Args:
        rows: lines of cells, of any lengths.
        title: drawn above all lines.
        width: of the sheet, at least what the cells need.
    """
    laid = [[_Laid.of(cell, side, font_size) for cell in row] for row in rows]
    line = font_size + 4
    needed = GAP + max((sum(c.width + GAP for c in row) for row in laid), default=0)
    top = GAP + (2 * line if title else 0)
    canvas = Image.new("RGB", (max(width, needed), top + sum(max(c.height for c in row) + GAP for row in laid)), PAPER)
    draw = ImageDraw.Draw(canvas)
    if title:
        draw.text((GAP, GAP), title, INK, ImageFont.load_default(font_size + 4))
    for row in laid:
        left = GAP
        pictures_top = top + (line if any(c.cell.heading for c in row) else 0)
        for cell in row:
            cell.draw(canvas, draw, left, top, pictures_top)
            left += cell.width + GAP
        top += max(c.height for c in row) + GAP
    return canvas


@dataclass(frozen=True)
class _Laid:
    """A cell with its sizes: width and height in pixels, and its wrapped lines with their colours."""

    cell: Cell
    pictures: list[Image.Image]
    lines: list[tuple[str, tuple[int, int, int]]]
    width: int
    height: int
    font_size: int

    @classmethod
    def of(cls, cell: Cell, side: int, font_size: int) -> _Laid:
        pictures = [_scaled(image, side) for image in cell.images]
        width = max(1, len(pictures)) * (side + 4) - 4
        font = ImageFont.load_default(font_size)
        lines = [
            (part, colour)
            for words, colour in ((cell.text, INK), (cell.note, QUIET))
            for part in _wrap(words, font, width)
        ]
        line = font_size + 4
        height = max((p.height for p in pictures), default=0) + (len(lines) + bool(cell.heading)) * line + 4
        return cls(cell, pictures, lines, width, height, font_size)

    def draw(self, canvas: Image.Image, draw: ImageDraw.ImageDraw, left: int, top: int, pictures_top: int) -> None:
        if self.cell.heading:
            draw.text((left, top), self.cell.heading, QUIET, ImageFont.load_default(self.font_size - 2))
        bottom, at = pictures_top, left
        for picture in self.pictures:
            canvas.paste(picture, (at, pictures_top))
            at += picture.width + 4
            bottom = max(bottom, pictures_top + picture.height)
        font = ImageFont.load_default(self.font_size)
        for number, (words, colour) in enumerate(self.lines):
            draw.text((left, bottom + 3 + number * (self.font_size + 4)), words, colour, font)


def stack(sheets: Sequence[Image.Image]) -> Image.Image:
    """Sheets below each other."""
    canvas = Image.new("RGB", (max(s.width for s in sheets), sum(s.height for s in sheets)), PAPER)
    top = 0
    for sheet in sheets:
        canvas.paste(sheet, (0, top))
        top += sheet.height
    return canvas


def save_image(image: Image.Image, path: str | Path, **options: Any) -> None:
    """Write a picture under a temporary name, then rename it into place; parent folders are made.

    Args:
        options: Pillow's, for its format.

    Raises:
        ValueError: an ending that names no picture format. OSError: a full or read-only disk; the message names the file.
    """
    kind = picture_format(path)
    with replacing(path) as temporary:
        image.save(temporary, kind, **options)


def save_gif(frames: Sequence[Image.Image], path: str | Path, milliseconds: Sequence[int]) -> None:
    """Write an endless animation; errors as of `save_image`.

    Args:
        milliseconds: how long each frame stays.
    """
    kind = picture_format(path, _ANIMATED)
    with replacing(path) as temporary:
        rest, times = list(frames[1:]), list(milliseconds)
        frames[0].save(temporary, kind, save_all=True, append_images=rest, duration=times, loop=0)


def picture_format(path: str | Path, kinds: Mapping[str, str] | None = None) -> str:
    """Pillow's name of the format that a file name asks for.

    Args:
        kinds: formats by ending; those of pictures when left out.

    Raises:
        ValueError: another ending.
    """
    kinds = _PICTURES if kinds is None else kinds
    if not isinstance(path, str | Path):
        raise ValueError(f"the file to write is a {type(path).__name__}; expected a path")
    ending = Path(path).suffix.lower()
    if ending not in kinds:
        raise ValueError(f"{str(path)!r} does not end in {', '.join(sorted(kinds))}; choose one of these endings")
    return kinds[ending]


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Lines of at most `width` pixels, broken between words, or inside one that is too long."""
    lines, line = [], ""
    for word in text.split():
        joined = f"{line} {word}" if line else word
        if font.getlength(joined) <= width:
            line = joined
            continue
        if line:
            lines.append(line)
        line = word
        while font.getlength(line) > width and len(line) > 1:
            fits = next(n for n in range(len(line) - 1, 0, -1) if n == 1 or font.getlength(line[:n]) <= width)
            lines.append(line[:fits])
            line = line[fits:]
    return [*lines, line] if line else lines


def _scaled(image: Image.Image, side: int) -> Image.Image:
    grows = image.width < side
    size = (side, round(side * image.height / image.width))
    how = Image.Resampling.NEAREST if grows and side % image.width == 0 else Image.Resampling.LANCZOS
    return image.convert("RGB").resize(size, how)
