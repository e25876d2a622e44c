"""Seeded faces made of layers of pixel art: unlimited, exactly described, and readable back from pixels.

A face is twelve attributes. Its picture is drawn on a grid of 16 x 16 pixels, each four by four pixels large in a picture of 64.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unidiff.errors import read_json, reading
from unidiff.pictures import decode_picture

LAYERS_FOLDER = Path(__file__).resolve().parents[2] / "assets" / "faces"
SIDE = 16  # pixels of the artwork
IMAGE_SIZE = 64
NONE = "none"
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "skin": ("light", "tan", "brown", "dark"),
    "hair": (NONE, "short", "spiky", "curly", "bob", "long", "braids", "buns"),
    "hair_colour": (NONE, "black", "brown", "blond", "red", "blue"),
    "eyes": ("big", "ahead", "left", "right"),
    "eye_colour": ("brown", "blue", "green"),
    "mouth": ("smile", "frown", "open", "straight", "grin"),
    "beard": (NONE, "full", "goatee", "long"),
    "glasses": (NONE, "black", "red", "sunglasses"),
    "hat": (NONE, "cap", "beanie", "top hat"),
    "clothing": ("plain", "striped", "checked", "overalls", "turtleneck"),
    "clothing_colour": ("red", "blue", "green", "orange", "purple"),
    "background": ("blue", "pink", "purple", "green", "yellow", "gray"),
}
"""Values of each attribute; the hair of a bald head has no colour."""
_NONE_WEIGHT = {"hair": 1.0, "beard": 3.0, "glasses": 2.0, "hat": 3.0}  # of `none`; every other value weighs 1
UNDER_A_HAT = (NONE, "bob", "long", "braids")
"""Hair that can be told apart below a hat."""
ORDER = ("skin", "clothing", "eyes", "glasses", "beard", "mouth", "hair", "hat")
"""Layers from the lowest to the highest."""
_TINTED = {"clothing": "clothing_colour", "eyes": "eye_colour", "hair": "hair_colour"}
Pair = tuple[str, str, str, str]
HELD_OUT: tuple[Pair, ...] = (
    ("hair", "curly", "background", "pink"),
    ("hair", "spiky", "eyes", "left"),
    ("hair", "bob", "mouth", "straight"),
    ("hair_colour", "red", "mouth", "frown"),
    ("hair_colour", "blond", "eye_colour", "green"),
    ("glasses", "sunglasses", "clothing", "striped"),
    ("glasses", "red", "hat", "beanie"),
    ("hat", "cap", "beard", "goatee"),
    ("clothing_colour", "green", "mouth", "grin"),
    ("clothing_colour", "red", "eyes", "right"),
    ("background", "gray", "clothing", "overalls"),
    ("background", "yellow", "eye_colour", "blue"),
)
"""Pairs of values that never occur together in the training split."""
SPLITS = ("train", "held_out", "all")


class Face(NamedTuple):
    """The whole truth about a picture: one value of `ATTRIBUTES` for each."""

    skin: str
    hair: str
    hair_colour: str
    eyes: str
    eye_colour: str
    mouth: str
    beard: str
    glasses: str
    hat: str
    clothing: str
    clothing_colour: str
    background: str

    def shows(self, pair: Pair) -> bool:
        """Whether it has both values of a pair."""
        return getattr(self, pair[0]) == pair[1] and getattr(self, pair[2]) == pair[3]

    def altered(self, **values: str) -> Face:
        """The same face with other values of some attributes."""
        return self._replace(**values)

    def possible(self) -> bool:
        """Whether the world may draw it: hair has a colour unless there is none, and hats leave only some hair to be seen."""
        bald = self.hair == NONE
        return (self.hair_colour == NONE) == bald and (self.hat == NONE or self.hair in UNDER_A_HAT)


class Layers:
    """The layers of the artwork.

    Attributes:
        rgba: float32 `[L + 1, 16, 16, 4]` in [0, 1], straight alpha; the last is empty. grounds: float32 `[6, 3]`.
    """

    def __init__(self, folder: Path = LAYERS_FOLDER) -> None:
        """Read `layers.png` and `layers.json`; `FileNotFoundError` or `ValueError` where they are not both whole."""
        index_path, image_path = folder / "layers.json", folder / "layers.png"
        recipe = "make it with training/make_face_layers.py"
        if missing := [path for path in (index_path, image_path) if not path.is_file()]:
            raise FileNotFoundError(f"{missing[0]} is missing; {recipe}")
        index = read_json(index_path, "the index of face layers")
        with reading(index_path, "the index of face layers", recipe):
            columns = int(index["columns"])
            self._places = {(n["layer"], n["value"], n["colour"]): i for i, n in enumerate(index["layers"])}
            shades = [bytes.fromhex(index["backgrounds"][name][1:]) for name in ATTRIBUTES["background"]]
            self.grounds = torch.tensor([list(shade) for shade in shades]) / 255
        sheet = np.asarray(decode_picture(image_path).convert("RGBA"))
        corners = [(i // columns * SIDE, i % columns * SIDE) for i in range(len(self._places))]
        tiles = [sheet[top : top + SIDE, left : left + SIDE] for top, left in corners]
        if any(tile.shape[:2] != (SIDE, SIDE) for tile in tiles):
            raise ValueError(f"{str(image_path)!r} has no room for {len(tiles)} layers; {recipe}")
        tiles.append(np.zeros_like(tiles[0]))
        self.rgba = torch.from_numpy(np.stack(tiles)).float() / 255

    def indices(self, face: Face) -> list[int]:
        """Which layers a face is made of, in the order of `ORDER`."""
        found = []
        for layer in ORDER:
            value = getattr(face, layer)
            colour = getattr(face, _TINTED[layer]) if layer in _TINTED else ""
            found.append(len(self._places) if value == NONE else self._places[layer, value, colour])
        return found

    def touched(self, layer: str) -> Tensor:
        """bool `[16, 16]`: the pixels in which any value of a layer shows something."""
        own = [place for (name, _, _), place in self._places.items() if name == layer]
        return (self.rgba[own][..., 3] > 0).any(0)

    def compose(self, faces: Sequence[Face], rows: slice = slice(0, SIDE)) -> Tensor:
        """Pictures at the size of the artwork: float32 `[N, 3, 16, 16]` in the 256 steps of a picture file, or some rows of them."""
        names = ATTRIBUTES["background"]
        canvas = self.grounds[[names.index(face.background) for face in faces]][:, None, None]
        pixels, places = self.rgba[:, rows], torch.tensor([self.indices(face) for face in faces])  # [N, 8]
        for layer in places.unbind(1):
            shown = pixels[layer]  # [N, rows, 16, 4]
            canvas = torch.lerp(canvas, shown[..., :3], shown[..., 3:])
        return ((canvas * 255).round() / 255).movedim(-1, 1).contiguous()


@lru_cache(maxsize=1)
def default_layers() -> Layers:
    """The shipped layers, read once per process."""
    return Layers()


def render_batch(faces: Sequence[Face]) -> Tensor:
    """float32 `[N, 3, 64, 64]` in [0, 1]."""
    step = IMAGE_SIZE // SIDE
    return default_layers().compose(faces).repeat_interleave(step, 2).repeat_interleave(step, 3)


def render(face: Face) -> Image.Image:
    """The picture."""
    return Image.fromarray((render_batch([face])[0] * 255).round().to(torch.uint8).movedim(0, -1).numpy())


class FaceGenerator:
    """Faces by number, each a function of the seed and the number alone.

    Args:
        split: `train` has no pair of `HELD_OUT`, `held_out` at least one in every face, `all` both.
    """

    def __init__(self, seed: int = 0, split: str = "train") -> None:
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r:.80}; expected one of {', '.join(SPLITS)}")
        self.seed, self.split = seed, split

    def rng(self, index: int, purpose: str) -> random.Random:
        """A generator of its own for each face and purpose."""
        return random.Random(f"faces|{self.seed}|{self.split}|{index}|{purpose}")

    def face(self, index: int) -> Face:
        rng = self.rng(index, "face")
        pair = HELD_OUT[index % len(HELD_OUT)] if self.split == "held_out" else None
        while True:
            face = _draw(rng, dict([pair[:2], pair[2:]]) if pair else {})
            seen = any(face.shows(other) for other in HELD_OUT)
            if face.possible() and (self.split == "all" or seen == (self.split == "held_out")):
                return face


def _draw(rng: random.Random, fixed: dict[str, str]) -> Face:
    made = dict(fixed)
    for name, values in ATTRIBUTES.items():
        if name == "hair_colour" or name in made:
            continue
        if name == "hat" and made["hair"] not in UNDER_A_HAT:
            made[name] = NONE
            continue
        made[name] = rng.choices(values, [_NONE_WEIGHT.get(name, 1.0) if v == NONE else 1.0 for v in values])[0]
    if made["hair"] == NONE:
        made["hair_colour"] = NONE
    elif "hair_colour" not in made:
        made["hair_colour"] = rng.choice(ATTRIBUTES["hair_colour"][1:])
    return Face(**made)
