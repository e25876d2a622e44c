"""Plain charts drawn with Pillow: points in the plane, and heat maps of matrices."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

Point = tuple[float, float]
INK, PAPER, LINE = (28, 30, 36), (255, 255, 255), (214, 217, 224)
COLOURS = ((31, 119, 180), (214, 39, 40), (44, 160, 44), (148, 103, 189), (255, 127, 14), (23, 190, 207), (140, 86, 75))
UNKNOWN = (236, 236, 236)


def scatter(
    series: Mapping[str, Sequence[Point]],
    title: str,
    x_name: str,
    y_name: str,
    size: tuple[int, int] = (760, 480),
) -> Image.Image:
    """Points by series, joined from left to right, on a logarithmic x axis.

    Args:
        series: name to (x, y) with x above 0; points that are not finite are left out.
        size: width and height in pixels.

    Raises:
        ValueError: an x that is not positive.
    """
    kept = {n: sorted(p for p in points if all(map(math.isfinite, p))) for n, points in series.items()}
    every = [p for points in kept.values() for p in points]
    if any(x <= 0 for x, _ in every):
        raise ValueError(f"the x axis is logarithmic, but the smallest x is {min(x for x, _ in every)}")
    canvas = Image.new("RGB", size, PAPER)
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(13)
    left, top, right, bottom = 70, 50, size[0] - 190, size[1] - 60
    draw.text((left, 6), title, INK, ImageFont.load_default(16))
    low, high = _range([math.log10(x) for x, _ in every])
    floor, ceiling = _range([y for _, y in every])

    def place(point: Point) -> Point:
        across = (math.log10(point[0]) - low) / (high - low)
        return left + across * (right - left), bottom - (point[1] - floor) / (ceiling - floor) * (bottom - top)

    for i in range(5):
        x, y = 10 ** (low + (high - low) * i / 4), floor + (ceiling - floor) * i / 4
        across, up = place((x, y))
        draw.line((left, up, right, up), LINE)
        draw.line((across, top, across, bottom), LINE)
        draw.text((left - 6, up), f"{y:.3g}", INK, font, anchor="rm")
        draw.text((across, bottom + 6), f"{x:.3g}", INK, font, anchor="ma")
    draw.text(((left + right) / 2, bottom + 28), x_name, INK, font, anchor="ma")
    draw.text((left, top - 8), y_name, INK, font, anchor="ls")
    for number, (name, points) in enumerate(kept.items()):
        colour = COLOURS[number % len(COLOURS)]
        dots = [place(p) for p in points]
        if len(dots) > 1:
            draw.line(dots, colour, 2)
        for across, up in dots:
            draw.ellipse((across - 4, up - 4, across + 4, up + 4), colour)
        line = top + 18 * number
        draw.rectangle((right + 16, line + 2, right + 26, line + 12), colour)
        draw.text((right + 32, line), name, INK, font)
    return canvas


def heat_map(
    values: Tensor, title: str, rows: str, columns: str, low: float, high: float, cell: int = 16
) -> Image.Image:
    """A matrix in colours, from dark (`low`) to bright (`high`); NaN is grey.

    Args:
        values: float `[rows, columns]`; row 0 is at the top.
        rows, columns: what they stand for.
        cell: pixels per entry.

    Raises:
        ValueError: `values` is no matrix, or `low` is not below `high`.
    """
    if values.ndim != 2 or not low < high:
        raise ValueError(f"heat_map needs a matrix and low < high; got shape {tuple(values.shape)}, {low} and {high}")
    share = ((values.double() - low) / (high - low)).clamp(0, 1)
    known = ~share.isnan()
    share = share.nan_to_num()
    # black - violet - orange - pale yellow, linear between four anchors
    anchors = torch.tensor([(8, 8, 32), (120, 28, 109), (237, 105, 37), (252, 255, 164)], dtype=torch.float64)
    place = share * (len(anchors) - 1)
    first = place.floor().clamp_max(len(anchors) - 2).long()
    part = (place - first)[..., None]
    pixels = torch.lerp(anchors[first], anchors[first + 1], part)
    pixels = torch.where(known[..., None], pixels, torch.tensor(UNKNOWN, dtype=torch.float64))
    picture = Image.fromarray(pixels.round().to(torch.uint8).numpy())
    picture = picture.resize((values.shape[1] * cell, values.shape[0] * cell), Image.Resampling.NEAREST)
    font = ImageFont.load_default(13)
    width = max(picture.width, round(font.getlength(title)), 260) + 24
    canvas = Image.new("RGB", (width, picture.height + 74), PAPER)
    draw = ImageDraw.Draw(canvas)
    draw.text((12, 8), title, INK, font)
    draw.text((12, 26), f"down: {rows}, across: {columns}", INK, font)
    canvas.paste(picture, (12, 46))
    draw.text((12, picture.height + 52), f"dark {low:.3g}, bright {high:.3g}, grey: none", INK, font)
    return canvas


def _range(values: Sequence[float]) -> Point:
    """Lowest and highest with some room, never equal."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    room = 0.06 * (high - low) or 0.5
    return low - room, high + room


def stack(pictures: Sequence[Image.Image], columns: int) -> Image.Image:
    """Pictures in lines of `columns`, each in a cell as large as the largest."""
    width, height = max(p.width for p in pictures), max(p.height for p in pictures)
    canvas = Image.new("RGB", (width * min(columns, len(pictures)), height * -(-len(pictures) // columns)), PAPER)
    for number, picture in enumerate(pictures):
        canvas.paste(picture, (number % columns * width, number // columns * height))
    return canvas
