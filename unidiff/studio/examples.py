"""Pictures of examples and of earlier results, at sizes to look at and to paint on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from unidiff.studio.snippets import png
from unidiff.studio.views import data_address

INK = "#ff2d78"
_PAINTED, _SMALL = 384, 192  # pixels: room for a brush; a picture in the history

LOAD_PAINTING = """
async (index) => {
  const part = PARTS[index], place = document.querySelector("#EDITOR .image-container");
  if (!part || !place) return index;
  const file = new File([await (await fetch(part.picture)).blob()], "example.png", { type: "image/png" });
  const editor = window.editor, moved = new DataTransfer();
  if (editor && editor.set_tool) editor.set_tool("image");
  moved.items.add(file);
  place.dispatchEvent(new DragEvent("drop", { dataTransfer: moved, bubbles: true, cancelable: true }));
  for (let wait = 0; wait < 100 && !(editor && editor.current_tool === "draw"); wait++)
    await new Promise((done) => setTimeout(done, 100));
  await new Promise((done) => setTimeout(done, 200));
  const tool = editor && editor.tools && [...editor.tools.values()].find((own) => own.brush_textures);
  if (!tool || !part.lines.length) return index;
  try {
    const brush = tool.brush_textures;
    brush.preserve_canvas_state();
    for (const [x0, x1, y] of part.lines) brush.draw_segment(x0, y, x1, y, part.radius, "INK", 1, "draw");
    brush.commit_stroke();
    editor.notify("change");
  } catch (error) { console.warn("the hole of the example could not be painted", error); }
  return index;
}
""".replace("INK", INK)
"""JavaScript that puts an example into gradio's editor as if a person had dropped it there, and paints its hole with the brush."""


def painted_example(example: Any) -> tuple[dict[str, Any], Image.Image]:
    """What `LOAD_PAINTING` needs of a `TaskExample`, and a picture of both to look at.

    The hole is painted in lines of a pixel of the small picture.
    """
    picture = larger(example.picture, _PAINTED).convert("RGB")
    times = picture.width // example.picture.width
    hole = (
        np.zeros(example.picture.size[::-1], bool)
        if example.hole is None
        else np.asarray(example.hole.convert("L")) > 0
    )
    lines = []
    for row, painted in enumerate(hole):
        edges = np.flatnonzero(np.diff(np.concatenate([[0], painted.astype(np.int8), [0]])))
        for start, stop in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
            lines.append([(start + 0.5) * times, (stop - 0.5) * times, (row + 0.5) * times])
    shown = picture.copy()
    shown.paste(INK, mask=larger(Image.fromarray(hole).convert("L"), _PAINTED))
    return {"picture": data_address(picture), "lines": lines, "radius": times / 2}, shown


def example_file(image: Image.Image, folder: Path) -> str:
    """A new PNG file of a picture in a folder."""
    path = folder / f"{len(list(folder.iterdir()))}.png"
    path.write_bytes(png(larger(image, _PAINTED)))
    return str(path)


def larger(image: Image.Image, side: int) -> Image.Image:
    """Every pixel repeated as often as fits into `side`."""
    times = max(1, side // max(image.size))
    return image if times == 1 else image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)


def thumbnail(image: Image.Image | None) -> Image.Image:
    """A picture for the history; a plain one where there is none."""
    if image is None:
        return Image.new("RGB", (_SMALL, _SMALL), "#8890a6")
    image = larger(image, _SMALL)
    image = image.copy()
    image.thumbnail((_SMALL, _SMALL))
    return image
