"""The page of a world's demo: sections of pictures with words, and how some of them appeared, in one HTML file."""

from __future__ import annotations

import html
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from unidiff.files import replace_text
from unidiff.html_page import html_page, image_address
from unidiff.pipelines.sheet import Cell, draw_sheet, save_image, stack

_SIDE = 128  # pixels of a picture on the page
_STYLE = f"""
h3 {{ font-size: 1rem; margin: 1.2rem 0 .4rem }} p.soft {{ margin: 0 0 .8rem; font-size: .85rem }}
.grid {{ display: flex; flex-wrap: wrap; gap: 1.2rem }} .grid figure {{ max-width: 100% }}
.images {{ display: flex; gap: 4px }} .images > * {{ flex: 0 1 {_SIDE}px; min-width: 0; display: block }}
.images img {{ width: 100%; aspect-ratio: 1; display: block; image-rendering: pixelated; border-radius: 4px;
  outline: 1px solid var(--line); outline-offset: -1px }}
figcaption {{ font-size: .92rem; margin-top: .3rem }} figcaption small {{ display: block; color: var(--soft) }}
details {{ font-size: .85rem; color: var(--soft) }} ol {{ margin: .2rem 0; padding-left: 1.6rem }}
@media (max-width: 30rem) {{
  .grid figure {{ width: 100% !important }} .grid .one {{ width: calc(50% - .6rem) !important }} .images > * {{ flex: 1 1 0 }}
}}
"""


class Unmasking(NamedTuple):
    """How a row appeared: its picture before the first pass and after each, and its words likewise."""

    frames: tuple[Image.Image, ...]
    words: tuple[str, ...]


class Section(NamedTuple):
    """A title, its cells, what their pictures are, what they cost, and how the first ones appeared."""

    title: str
    cells: tuple[Cell, ...]
    shows: tuple[str, ...]
    cost: str
    unmasking: tuple[Unmasking, ...] = ()

    def lines(self, per_line: int) -> list[tuple[Cell, ...]]:
        """The cells in lines of at most `2 * per_line` pictures."""
        pictures = max(len(cell.images) for cell in self.cells)
        count = max(1, 2 * per_line // pictures)
        return [self.cells[i : i + count] for i in range(0, len(self.cells), count)]


def unmasking_of(result: Any, rows: int) -> tuple[Unmasking, ...]:
    """Of the first rows of a `UniDiffOutput` with a trajectory."""
    way = result.trajectory
    return tuple(
        Unmasking(tuple(Image.fromarray(frame[b].numpy()) for frame in way.frames), tuple(t[b] for t in way.texts))
        for b in range(min(rows, len(result.texts)))
    )


def section_of(title: str, cells: Sequence[Cell], shows: tuple[str, ...], result: Any) -> Section:
    """A section of a `UniDiffOutput`, with how its first rows appeared where that was recorded."""
    cost = f"{len(result.texts)} rows, {result.nfe} forward passes, {result.seconds:.1f} s"
    way = unmasking_of(result, 4) if result.trajectory is not None else ()
    return Section(title, tuple(cells), shows, cost, way)


def write_demo(sections: Sequence[Section], out: str | Path) -> tuple[Path, Path]:
    """`demo.png` and `demo.html` in a folder; returns their paths."""
    png, page = Path(out) / "demo.png", Path(out) / "demo.html"
    save_image(stack([draw_sheet(s.lines(4), title=s.title) for s in sections]), png)
    write_page(sections, page, title="unidiff demo")
    return png, page


def write_page(sections: Sequence[Section], path: str | Path, title: str) -> None:
    """One HTML page with its pictures in it, complete or not at all."""
    replace_text(path, html_page(title, [part for section in sections for part in _parts(section)], _STYLE))


def _parts(section: Section) -> Iterator[str]:
    yield f'<h2>{html.escape(section.title)}</h2>\n<p class="soft">{html.escape(section.cost)}</p>'
    yield '<div class="grid">'
    yield from (_figure(cell, section.shows) for cell in section.cells)
    yield "</div>"
    if section.unmasking:
        yield '<h3>Pass by pass</h3>\n<div class="grid">'
        yield from map(_animation, section.unmasking)
        yield "</div>"


def _figure(cell: Cell, shows: Sequence[str]) -> str:
    named = zip(shows, cell.images, strict=True)
    images = "".join(_image(_png(image), f"{what}: {cell.text}") for what, image in named)
    note = f"<small>{html.escape(cell.note)}</small>" if cell.note else ""
    return _captioned(images, len(cell.images), html.escape(cell.text) + note)


def _animation(way: Unmasking) -> str:
    """The picture as it appears (its end, for readers who want no movement), and the words after each pass."""
    still = _png(way.frames[-1])
    moving = _image(_gif(way.frames), f"appears pass by pass: {way.words[-1]}")
    images = f'<picture><source media="(prefers-reduced-motion: reduce)" srcset="{still}">{moving}</picture>'
    words = ""
    if way.words[0] != way.words[-1]:
        said = "".join(f"<li>{html.escape(text)}</li>" for text in dict.fromkeys(way.words))
        words = f"<details><summary>the words, pass by pass</summary><ol>{said}</ol></details>"
    return _captioned(images, 1, html.escape(way.words[-1]) + words)


def _captioned(images: str, count: int, caption: str) -> str:
    kind = ' class="one"' if count == 1 else ""
    width = count * (_SIDE + 4) - 4
    return (
        f'<figure{kind} style="width:{width}px"><div class="images">{images}</div>'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _image(address: str, alt: str) -> str:
    return f'<img alt="{html.escape(alt)}" src="{address}">'


def _png(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return image_address(file.getvalue(), "png")


def _gif(frames: Sequence[Image.Image]) -> str:
    """An endless animation whose end stays for three seconds."""
    file, times = io.BytesIO(), [250] * (len(frames) - 1) + [3000]
    frames[0].save(file, "GIF", save_all=True, append_images=list(frames[1:]), duration=times, loop=0)
    return image_address(file.getvalue(), "gif")
