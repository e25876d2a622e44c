"""The Python code that makes the result of a run again."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from PIL import Image

_FILES = {"image": "picture.png", "mask_image": "mask.png"}


def snippet(model: str, task: str, arguments: Mapping[str, Any], stopped: int | None = None, place: str = "") -> str:
    """Code that makes the same call; pictures are read from `input_files`.

    Args:
        model: as it was named. task: the pipeline's method. arguments: of the call.
        stopped: the pass after which the run was stopped. place: what `to` moves the pipeline to, "" for the CPU.
    """
    shown = [f"    {name}={_FILES.get(name) if name in _FILES else value!r}," for name, value in arguments.items()]
    shown = [
        f'    {name}="{_FILES[name]}",' if name in _FILES else line for line, name in zip(shown, arguments, strict=True)
    ]
    if stopped is not None:
        shown.append(f"    callback_on_step_end=lambda pipe, step, t, tensors: step < {stopped - 1},")
    moved = f'.to("{place}")' if place else ""
    saved = 'out.images[0].save("result.png")\n' if task in _DRAWING else ""
    return (
        f"from unidiff import UniDiffPipeline\n\npipe = UniDiffPipeline.from_pretrained({model!r}){moved}\n"
        f"out = pipe.{task}(\n" + "\n".join(shown) + f"\n)\nprint(out.texts[0])\n{saved}"
    )


_DRAWING = ("text_to_image", "inpaint", "generate", "edit")


def input_files(arguments: Mapping[str, Any]) -> dict[str, bytes]:
    """The pictures of a call as PNG files, by the names that `snippet` reads."""
    return {_FILES[name]: png(value) for name, value in arguments.items() if isinstance(value, Image.Image)}


def png(image: Image.Image) -> bytes:
    """The bytes of a PNG file."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
