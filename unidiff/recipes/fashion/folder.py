"""The photographs as a person keeps their own: a folder of PNG files with a table of captions, as `unidiff shards` takes it."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from unidiff.errors import writing
from unidiff.files import check_writable, replacing_folder
from unidiff.recipes.fashion.attributes import Thresholds
from unidiff.recipes.fashion.captions import caption
from unidiff.recipes.fashion.photographs import CLASSES, Photographs, load

TABLE, PROMPTS, ROWS = "metadata.jsonl", "prompts.txt", "pictures.jsonl"


def write_folder(
    source: str | Path,
    split: str,
    out: Path,
    captions_each: int = 1,
    seed: int = 0,
    tick: Callable[[int, int], None] = lambda more, total: None,
) -> int:
    """Write PNG files and `metadata.jsonl` (file_name, caption, class); how many captions there are.

    For `unidiff generate --prompts` there are also `prompts.txt`, the captions alone, and `pictures.jsonl`, which asks for a
    caption of every picture.

    Args:
        source: folder of the IDX files. captions_each: different sentences about each photograph are tried for so often.
        seed: of the captions. tick: called with how many more pictures are written, of how many.

    Raises:
        FileExistsError: `out` is there. As of `load` and `Thresholds.of`.
    """
    check_writable(out / TABLE)
    if out.exists():
        raise FileExistsError(f"{str(out)!r} is there already; name another folder")
    shown = load(source, split)
    lines = captions_of(shown, Thresholds.of(load(source, "train")), split, captions_each, seed)
    with replacing_folder(out, flush=False) as folder, writing(out, folder):
        for number, pixels in enumerate(shown.pixels):
            Image.fromarray(pixels).save(folder / f"{number:06d}.png")
            tick(1, len(shown))
        rows = [
            {"file_name": f"{number:06d}.png", "caption": words, "class": CLASSES[shown.labels[number]]}
            for number, own in enumerate(lines)
            for words in own
        ]
        (folder / TABLE).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        (folder / PROMPTS).write_text("".join(row["caption"] + "\n" for row in rows), encoding="utf-8")
        asked = [{"image": f"{number:06d}.png"} for number in range(len(shown))]
        (folder / ROWS).write_text("".join(json.dumps(row) + "\n" for row in asked), encoding="utf-8")
    return len(rows)


def captions_of(
    shown: Photographs, thresholds: Thresholds, split: str, captions_each: int = 1, seed: int = 0
) -> list[list[str]]:
    """Captions of every photograph, all different; they depend on split, number and seed alone."""
    found = []
    for number, (label, levels) in enumerate(
        zip(shown.labels.tolist(), thresholds.levels(shown.pixels / 255, shown.labels).tolist(), strict=True)
    ):
        rng = random.Random(f"{seed}|{split}|{number}")
        found.append(list(dict.fromkeys(caption(label, levels, rng) for _ in range(captions_each))))
    return found
