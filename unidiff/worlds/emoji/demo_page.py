"""One self-contained HTML page of pictures and words; the pictures are embedded in it."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from unidiff.files import replace_text
from unidiff.pipelines.sheet import Cell

_STYLE = """
body { font: 15px/1.4 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; color: #1c1e24 }
h2 { margin: 2.2rem 0 .2rem; font-size: 1.15rem } p.cost { margin: 0 0 .8rem; color: #6e727c; font-size: .85rem }
.grid { display: flex; flex-wrap: wrap; gap: 1.2rem } figure { margin: 0 }
.images { display: flex; gap: 4px } img { width: 128px; image-rendering: pixelated; border-radius: 3px }
figcaption { font-size: .92rem } figcaption small { display: block; color: #6e727c }
"""


@dataclass(frozen=True)
class Section:
    """A title, its cells, and what they cost."""

    title: str
    cells: tuple[Cell, ...]
    cost: str = ""

    def lines(self, per_line: int) -> list[tuple[Cell, ...]]:
        """The cells in lines of at most `2 * per_line` pictures."""
        pictures = max(len(cell.images) for cell in self.cells)
        count = max(1, 2 * per_line // pictures)
        return [self.cells[i : i + count] for i in range(0, len(self.cells), count)]


def write_page(sections: Sequence[Section], path: str | Path, title: str) -> None:
    """Write the page, complete or not at all."""
    body, said = "\n".join(_section(section) for section in sections), html.escape(title)
    head = f'<meta charset="utf-8"><title>{said}</title><style>{_STYLE}</style>'
    page = f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body><h1>{said}</h1>\n{body}\n</body></html>\n'
    replace_text(path, page)


def _section(section: Section) -> str:
    figures = "\n".join(_figure(cell) for cell in section.cells)
    return (
        f'<h2>{html.escape(section.title)}</h2>\n<p class="cost">{html.escape(section.cost)}</p>\n'
        f'<div class="grid">\n{figures}\n</div>'
    )


def _figure(cell: Cell) -> str:
    images = "".join(f'<img alt="" src="data:image/png;base64,{_png(image)}">' for image in cell.images)
    note = f"<small>{html.escape(cell.note)}</small>" if cell.note else ""
    return (
        f'<figure style="width:{len(cell.images) * 132}px"><div class="images">{images}</div>'
        f"<figcaption>{html.escape(cell.text)}{note}</figcaption></figure>"
    )


def _png(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode("ascii")
