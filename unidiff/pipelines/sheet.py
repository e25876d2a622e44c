"""Sheets of pictures with words under them, drawn with Pillow alone, and files that appear complete or not at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from PIL import Image, ImageDraw, ImageFont

from unidiff.files import replacing

_PICTURES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
_ANIMATED = {".gif": "GIF"}
GAP = 12
INK, PAPER, QUIET, EDGE = (28, 30, 36), (255, 255, 255), (110, 114, 124), (214, 217, 224)
_PALE = 235  # pictures of at least this in a corner get an edge, or they would have none on paper


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
    """Cells in lines of any lengths, each picture scaled to a width of `side` pixels; small ones keep their pixels sharp.

    Args:
        title: drawn above all lines. width: of the sheet, at least what the cells need.
    """
    drawn = [[_draw_cell(cell, side, font_size, any(c.heading for c in row)) for cell in row] for row in rows]
    heights = [max(cell.height for cell in row) + GAP for row in drawn]
    needed = GAP + max((sum(cell.width + GAP for cell in row) for row in drawn), default=0)
    top = GAP + (2 * (font_size + 4) if title else 0)
    canvas = Image.new("RGB", (max(width, needed), top + sum(heights)), PAPER)
    if title:
        ImageDraw.Draw(canvas).text((GAP, GAP), title, INK, ImageFont.load_default(font_size + 4))
    for row, height in zip(drawn, heights, strict=True):
        left = GAP
        for cell in row:
            canvas.paste(cell, (left, top))
            left += cell.width + GAP
        top += height
    return canvas


def _draw_cell(cell: Cell, side: int, font_size: int, headed: bool) -> Image.Image:
    """A cell by itself, with room above where any of its line has a heading, and an edge around pale pictures."""
    pictures = [_scaled(image, side) for image in cell.images]
    font, line, width = ImageFont.load_default(font_size), font_size + 4, max(1, len(pictures)) * (side + 4) - 4
    words = [(part, INK) for part in _wrap(cell.text, font, width)]
    words += [(part, QUIET) for part in _wrap(cell.note, font, width)]
    top = line if headed else 0
    bottom = top + max((picture.height for picture in pictures), default=0)
    canvas = Image.new("RGB", (width, bottom + len(words) * line + 4), PAPER)
    draw = ImageDraw.Draw(canvas)
    draw.text((0, 0), cell.heading, QUIET, ImageFont.load_default(font_size - 2))
    for number, picture in enumerate(pictures):
        left = number * (side + 4)
        canvas.paste(picture, (left, top))
        corner = cast("tuple[int, ...]", picture.getpixel((0, 0)))
        if min(corner) > _PALE:
            draw.rectangle((left, top, left + picture.width - 1, top + picture.height - 1), outline=EDGE)
    for number, (part, colour) in enumerate(words):
        draw.text((0, bottom + 3 + number * line), part, colour, font)
    return canvas


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
    """Write an endless animation in which each frame stays so long; errors as of `save_image`."""
    kind = picture_format(path, _ANIMATED)
    with replacing(path) as temporary:
        rest, times = list(frames[1:]), list(milliseconds)
        frames[0].save(temporary, kind, save_all=True, append_images=rest, duration=times, loop=0)


def picture_format(path: str | Path, kinds: Mapping[str, str] = _PICTURES) -> str:
    """Pillow's name of the format that a file name's ending asks for; `ValueError` for one that is not among `kinds`."""
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
