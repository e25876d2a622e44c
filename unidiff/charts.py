"""Charts: all of them are matplotlib's, for pages and as pictures."""

from __future__ import annotations

import html
import io
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from PIL import Image

Draw: TypeAlias = Callable[[Any], None]
"""Draws on matplotlib's axes: one, or an array of them where a chart has several panels."""
_INK = "#010203"  # stands for the colour of a page's text, which may be light or dark


def inline_chart(draw: Draw, width: float, height: float, words: str, panels: tuple[int, int] = (1, 1)) -> str:
    """A chart as SVG for a page, its lines and letters in the colour of the page's text; the same every time.

    Args:
        width, height: in inches of 96 pixels. words: what it shows, for those who cannot see it. panels: rows, columns.
    """
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context(_colours(_INK) | {"svg.hashsalt": words, "svg.fonttype": "none"}):
        figure = _drawn(draw, width, height, panels)
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    drawn = buffer.getvalue().replace(_INK, "currentColor")
    drawn = drawn[drawn.index("<svg") + len("<svg") :]
    return f'<svg role="img" aria-label="{html.escape(words)}"{drawn}'


def chart_picture(draw: Draw, width: float, height: float, panels: tuple[int, int] = (1, 1)) -> Image.Image:
    """The same as a picture on white paper; width and height in inches of 150 pixels."""
    from matplotlib import rc_context
    from PIL import Image

    buffer = io.BytesIO()
    with rc_context(_colours("#1c1e24")):
        _drawn(draw, width, height, panels).savefig(buffer, format="png", dpi=150)
    return Image.open(buffer).convert("RGB")


def _drawn(draw: Draw, width: float, height: float, panels: tuple[int, int]) -> Any:
    from matplotlib.figure import Figure  # not pyplot, which keeps figures and looks for a screen

    figure = Figure((width, height), layout="constrained")
    draw(figure.subplots(*panels, squeeze=panels == (1, 1)))
    return figure


def _colours(ink: str) -> Any:  # whose keys matplotlib's types list one by one
    names = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    return dict.fromkeys(names, ink) | {"axes.spines.top": False, "axes.spines.right": False}
