"""The sprite atlas that ships with unidiff: Noto Color Emoji artwork, named by Unicode CLDR, read with Pillow alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from unidiff.errors import read_json, reading
from unidiff.pictures import decode_picture

ATLAS_FOLDER = Path(__file__).resolve().parents[2] / "assets" / "emoji"


@dataclass(frozen=True)
class Atlas:
    """Square RGBA sprites and their names.

    Attributes:
        names: one unique English short name per sprite.
        pixels: uint8 `[N, S, S, 4]`, straight (not premultiplied) alpha.
    """

    names: tuple[str, ...]
    pixels: np.ndarray

    @classmethod
    def load(cls, folder: Path = ATLAS_FOLDER) -> Atlas:
        """Read `atlas.png` and `atlas.json` from a folder.

        Raises:
            FileNotFoundError: one of the two files is missing. ValueError: one is damaged, or they do not belong together.
        """
        index_path, image_path = folder / "atlas.json", folder / "atlas.png"
        recipe = "make it with training/make_emoji_atlas.py"
        for path in (index_path, image_path):
            if not path.is_file():
                raise FileNotFoundError(f"{path} is missing; {recipe}")
        index = read_json(index_path, "the index of an atlas")
        with reading(index_path, "the index of an atlas", recipe):
            size, columns = int(index["sprite_size"]), int(index["columns"])
            names = tuple(s["name"].replace("’", "'") for s in index["sprites"])
            if size < 1 or columns < 1 or not names:
                raise ValueError(f"{len(names)} sprites of {size} pixels in {columns} columns")
        sheet = np.asarray(decode_picture(image_path).convert("RGBA"))
        if sheet.shape[0] < -(-len(names) // columns) * size or sheet.shape[1] < min(columns, len(names)) * size:
            raise ValueError(
                f"{str(image_path)!r} has no room for {len(names)} sprites of {size} pixels; make both anew"
            )
        corners = [(i // columns * size, i % columns * size) for i in range(len(names))]
        return cls(names, np.stack([sheet[top : top + size, left : left + size] for top, left in corners]))

    def scaled(self, size: int) -> np.ndarray:
        """float32 `[N, size, size, 4]` in [0, 1], premultiplied alpha, Lanczos-filtered from the full-size sprites."""
        return _scaled(self, size)

    def __hash__(self) -> int:
        return hash((self.names, self.pixels.shape))


@lru_cache(maxsize=1)
def default_atlas() -> Atlas:
    """The shipped atlas, read once per process."""
    return Atlas.load()


@lru_cache(maxsize=16)
def _scaled(atlas: Atlas, size: int) -> np.ndarray:
    out = []
    for sprite in atlas.pixels:
        image = Image.fromarray(sprite).convert("RGBa").resize((size, size), Image.Resampling.LANCZOS)
        out.append(np.asarray(image, dtype=np.uint8))  # "RGBa" is premultiplied already
    return np.stack(out).astype(np.float32) / 255.0
