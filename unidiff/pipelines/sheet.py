"""Sheets of pictures with words under them, drawn with Pillow alone, and files that appear complete or not at all."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

INK, PAPER, QUIET = (28, 30, 36), (255, 255, 255), (110, 114, 124)


@dataclass(frozen=True)
class Cell:
    """A picture (or none) with a text below and a small heading above."""

    image: Image.Image | None
    text: str = ""
    heading: str = ""


def draw_sheet(rows: Sequence[Sequence[Cell]], side: int = 128, title: str = "", font_size: int = 13) -> Image.Image:
    """Cells in lines, each picture scaled to `side` pixels without smoothing small ones.

    Args:
        rows: lines of cells, of any lengths.
        side: width of a cell's picture; the height keeps its proportions.
        title: drawn above all lines.
    """
    font, small = ImageFont.load_default(font_size), ImageFont.load_default(font_size - 2)
    gap, line = 12, font_size + 4
    width = gap + max(len(row) for row in rows) * (side + gap)
    letters = max(8, int(side / (font_size * 0.52)))
    heights = []
    for row in rows:
        pictures = max((_height(cell, side) for cell in row), default=0)
        words = max((len(_wrap(cell.text, letters)) for cell in row), default=0)
        headed = any(cell.heading for cell in row)
        heights.append((line if headed else 0, pictures, words * line))
    top = gap + (2 * line if title else 0)
    canvas = Image.new("RGB", (width, top + sum(sum(h) + gap for h in heights)), PAPER)
    draw = ImageDraw.Draw(canvas)
    if title:
        draw.text((gap, gap), title, INK, ImageFont.load_default(font_size + 4))
    for row, (headed, pictures, words) in zip(rows, heights, strict=True):
        for number, cell in enumerate(row):
            left = gap + number * (side + gap)
            if cell.heading:
                draw.text((left, top), cell.heading, QUIET, small)
            if cell.image is not None:
                canvas.paste(_scaled(cell.image, side), (left, top + headed))
            for k, words_line in enumerate(_wrap(cell.text, letters)):
                draw.text((left, top + headed + pictures + 3 + k * line), words_line, INK, font)
        top += headed + pictures + words + gap
    return canvas


def save_image(image: Image.Image, path: str | Path, kind: str | None = None, **options: Any) -> None:
    """Write a picture under a temporary name, then rename it into place; parent folders are made.

    Raises:
        ValueError: an ending that names no picture format.
    """
    path = Path(path)
    kind = kind or picture_format(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        image.save(temporary, kind, **options)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_text(text: str, path: str | Path) -> None:
    """As `save_image`, for UTF-8 text."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def picture_format(path: str | Path) -> str:
    """Pillow's name of the format that a file name asks for.

    Raises:
        ValueError: an ending other than png, jpg, jpeg or webp.
    """
    kinds = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
    ending = Path(path).suffix.lower()
    if ending not in kinds:
        raise ValueError(f"{str(path)!r} does not end in {', '.join(sorted(kinds))}; choose one of these endings")
    return kinds[ending]


def _wrap(text: str, letters: int) -> list[str]:
    return textwrap.wrap(text, letters) if text.strip() else ([] if not text else [""])


def _height(cell: Cell, side: int) -> int:
    return 0 if cell.image is None else round(side * cell.image.height / cell.image.width)


def _scaled(image: Image.Image, side: int) -> Image.Image:
    grows = image.width < side
    size = (side, round(side * image.height / image.width))
    how = Image.Resampling.NEAREST if grows and side % image.width == 0 else Image.Resampling.LANCZOS
    return image.convert("RGB").resize(size, how)
