"""Plain charts drawn with Pillow: points in the plane, and heat maps of matrices. `pipelines.sheet` gives them headings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from unidiff.pipelines.sheet import INK, PAPER

Point = tuple[float, float]
LINE, UNKNOWN = (214, 217, 224), (236, 236, 236)
COLOURS = ((31, 119, 180), (214, 39, 40), (44, 160, 44), (148, 103, 189), (255, 127, 14), (23, 190, 207), (140, 86, 75))
ANCHORS = ((8, 8, 32), (120, 28, 109), (237, 105, 37), (252, 255, 164))
"""From low to high: black - violet - orange - pale yellow, linear in between."""
WIDTH, HEIGHT = 760, 480


def scatter(series: Mapping[str, Sequence[Point]], x_name: str, y_name: str) -> Image.Image:
    """Points by series, joined from left to right, on a logarithmic x axis.

    Args:
        series: name to (x, y) with x above 0; points that are not finite are left out.

    Raises:
        ValueError: an x that is not positive.
    """
    kept = {n: sorted(p for p in points if all(map(math.isfinite, p))) for n, points in series.items()}
    every = [p for points in kept.values() for p in points]
    if any(x <= 0 for x, _ in every):
        raise ValueError(f"the x axis is logarithmic, but the smallest x is {min(x for x, _ in every)}")
    canvas = Image.new("RGB", (WIDTH, HEIGHT), PAPER)
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(13)
    left, top, right, bottom = 70, 30, WIDTH - 190, HEIGHT - 60
    (low, high), (floor, ceiling) = _range([math.log10(x) for x, _ in every]), _range([y for _, y in every])

    def place(x: float, y: float) -> Point:
        across = (math.log10(x) - low) / (high - low)
        return left + across * (right - left), bottom - (y - floor) / (ceiling - floor) * (bottom - top)

    for i in range(5):
        x, y = 10 ** (low + (high - low) * i / 4), floor + (ceiling - floor) * i / 4
        across, up = place(x, y)
        draw.line((left, up, right, up), LINE)
        draw.line((across, top, across, bottom), LINE)
        draw.text((left - 6, up), f"{y:.3g}", INK, font, anchor="rm")
        draw.text((across, bottom + 6), f"{x:.3g}", INK, font, anchor="ma")
    draw.text(((left + right) / 2, bottom + 28), x_name, INK, font, anchor="ma")
    draw.text((left, top - 8), y_name, INK, font, anchor="ls")
    for number, (name, points) in enumerate(kept.items()):
        colour, line = COLOURS[number % len(COLOURS)], top + 18 * number
        dots = [place(*p) for p in points]
        if len(dots) > 1:
            draw.line(dots, colour, 2)
        for across, up in dots:
            draw.ellipse((across - 4, up - 4, across + 4, up + 4), colour)
        draw.rectangle((right + 16, line + 2, right + 26, line + 12), colour)
        draw.text((right + 32, line), name, INK, font)
    return canvas


def heat_map(values: Tensor, low: float, high: float, cell: int = 16) -> Image.Image:
    """A matrix `[rows, columns]` in colours, from dark (`low`) to bright (`high`); NaN is grey, row 0 at the top.

    Args:
        cell: pixels per entry.

    Raises:
        ValueError: `values` is no matrix, or `low` is not below `high`.
    """
    if values.ndim != 2 or not low < high:
        raise ValueError(f"heat_map needs a matrix and low < high; got shape {tuple(values.shape)}, {low} and {high}")
    share = np.clip((values.double().numpy() - low) / (high - low), 0, 1) * (len(ANCHORS) - 1)
    colours = np.stack([np.interp(share, range(len(ANCHORS)), c) for c in zip(*ANCHORS, strict=True)], -1)
    colours = np.where(np.isnan(share)[..., None], UNKNOWN, colours).round().astype(np.uint8)
    return Image.fromarray(colours.repeat(cell, 0).repeat(cell, 1))


def _range(values: Sequence[float]) -> Point:
    """Lowest and highest with some room, never equal."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    room = 0.06 * (high - low) or 0.5
    return low - room, high + room
