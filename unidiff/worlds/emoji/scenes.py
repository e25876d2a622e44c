"""Seeded scenes of emoji sprites on flat backgrounds: unlimited, exactly described, and readable back from pixels.

A scene is laid out on an 8 x 8 grid of units (8 px each at 64 px, 16 px at 128 px) so that sprite origins fall on
multiples of the tokenizer factor. Four kinds: one object, several of the same, a pair in a relation, a mixed group.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unidiff.errors import read_json, reading
from unidiff.pictures import decode_picture

ATLAS_FOLDER = Path(__file__).resolve().parents[2] / "assets" / "emoji"
UNITS = 8
SIZES = LARGE, MEDIUM, SMALL = 4, 3, 2  # of sprites in units: 32, 24 and 16 px at 64 px
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (248, 248, 248),
    "black": (22, 22, 26),
    "gray": (146, 148, 152),
    "red": (196, 44, 48),
    "green": (62, 150, 76),
    "blue": (52, 104, 214),
    "yellow": (246, 208, 70),
    "purple": (142, 84, 186),
}
KINDS = ("single", "count", "pair", "group")


@dataclass(frozen=True)
class Atlas:
    """Square RGBA sprites and their names.

    Attributes:
        names: one unique English short name per sprite.
        pixels: uint8 `[N, S, S, 4]`, straight (not premultiplied) alpha.
        characters: the emoji that they show, where the index has them.
    """

    names: tuple[str, ...]
    pixels: np.ndarray
    characters: tuple[str, ...] = ()

    @classmethod
    def load(cls, folder: Path = ATLAS_FOLDER) -> Atlas:
        """Read `atlas.png` and `atlas.json`; `FileNotFoundError` or `ValueError` where they are not both whole."""
        index_path, image_path = folder / "atlas.json", folder / "atlas.png"
        recipe = "make it with training/make_emoji_atlas.py"
        if missing := [path for path in (index_path, image_path) if not path.is_file()]:
            raise FileNotFoundError(f"{missing[0]} is missing; {recipe}")
        index = read_json(index_path, "the index of an atlas")
        with reading(index_path, "the index of an atlas", recipe):
            size, columns = int(index["sprite_size"]), int(index["columns"])
            names = tuple(s["name"].replace("’", "'") for s in index["sprites"])
            characters = tuple(s.get("character", "") for s in index["sprites"])
            if size < 1 or columns < 1 or not names:
                raise ValueError(f"{len(names)} sprites of {size} pixels in {columns} columns")
        sheet = np.asarray(decode_picture(image_path).convert("RGBA"))
        if sheet.shape[0] < -(-len(names) // columns) * size or sheet.shape[1] < min(columns, len(names)) * size:
            raise ValueError(f"{str(image_path)!r} has no room for {len(names)} sprites of {size} pixels; remake both")
        corners = [(i // columns * size, i % columns * size) for i in range(len(names))]
        return cls(names, np.stack([sheet[top : top + size, left : left + size] for top, left in corners]), characters)

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


@dataclass(frozen=True)
class SceneObject:
    """A sprite: its name, the unit row and column of its top left corner, its size in units, and a pixel offset."""

    name: str
    row: int
    col: int
    size: int
    offset: tuple[int, int] = (0, 0)

    @property
    def units(self) -> tuple[slice, slice]:
        """The rows and columns of the grid that it covers."""
        return slice(self.row, self.row + self.size), slice(self.col, self.col + self.size)

    def overlaps(self, other: SceneObject) -> bool:
        """Whether two sprites share a unit."""
        near = lambda a, b: a < b + other.size and b < a + self.size  # noqa: E731
        return near(self.row, other.row) and near(self.col, other.col)


@dataclass(frozen=True)
class Scene:
    """Objects on a background; the whole truth about a picture."""

    objects: tuple[SceneObject, ...]
    background: str

    @property
    def counts(self) -> dict[str, int]:
        """How often each name occurs."""
        return dict(Counter(o.name for o in self.objects))


@dataclass(frozen=True)
class Profile:
    """How large the pictures are and what may appear in them.

    Args:
        name: for reports. image_size: pixels per side, a multiple of 8 units.
        num_objects: the first so many sprites of the atlas are used. kinds: relative frequency of each of `KINDS`.
        free_jitter: sprites move by up to so many pixels off the grid (0 in the embedded recipe: every sub-cell phase
            multiplies the number of appearances the model has to learn).
    """

    name: str
    image_size: int
    num_objects: int
    kinds: tuple[float, float, float, float] = (0.45, 0.2, 0.2, 0.15)
    free_jitter: int = 0
    atlas: Atlas = field(default_factory=default_atlas, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.image_size <= 0 or self.image_size % UNITS:
            raise ValueError(f"image_size {self.image_size} must be a positive multiple of {UNITS}")
        if not 2 <= self.num_objects <= len(self.atlas.names):
            raise ValueError(f"num_objects {self.num_objects} must lie in 2..{len(self.atlas.names)}, the atlas size")

    @property
    def unit(self) -> int:
        """Pixels per grid unit."""
        return self.image_size // UNITS

    @property
    def names(self) -> tuple[str, ...]:
        return self.atlas.names[: self.num_objects]

    def boxes(self, objects: Iterable[SceneObject]) -> Tensor:
        """bool `[H, W]`, True in the units that some sprites cover."""
        inside = torch.zeros(UNITS, UNITS, dtype=torch.bool)
        for item in objects:
            inside[item.units] = True
        return inside.repeat_interleave(self.unit, 0).repeat_interleave(self.unit, 1)


def get_profile(name: str, **changes) -> Profile:
    """`cpu` (64 px, 64 objects) or `gpu` (128 px, the whole atlas), with fields changed by keyword."""
    if name == "cpu":
        return Profile(**{"name": "cpu", "image_size": 64, "num_objects": 64, **changes})
    if name == "gpu":
        return Profile(**{"name": "gpu", "image_size": 128, "num_objects": len(default_atlas().names), **changes})
    raise ValueError(f"unknown profile {name!r}; expected 'cpu' or 'gpu'")


def render(scene: Scene, profile: Profile) -> np.ndarray:
    """The picture: uint8 `[H, W, 3]`."""
    size, unit = profile.image_size, profile.unit
    canvas = np.empty((size, size, 3), np.float32)
    canvas[:] = np.asarray(BACKGROUNDS[scene.background], np.float32) / 255.0
    for item in scene.objects:
        sprite = profile.atlas.scaled(item.size * unit)[profile.atlas.names.index(item.name)]
        top, left = item.row * unit + item.offset[0], item.col * unit + item.offset[1]
        bottom, right = min(size, top + sprite.shape[0]), min(size, left + sprite.shape[1])
        sprite = sprite[max(0, -top) : bottom - top, max(0, -left) : right - left]
        area = canvas[max(0, top) : bottom, max(0, left) : right]
        area *= 1.0 - sprite[..., 3:]
        area += sprite[..., :3]
    return (canvas * 255.0 + 0.5).clip(0, 255).astype(np.uint8)


def render_batch(scenes: Sequence[Scene], profile: Profile) -> Tensor:
    """float32 `[N, 3, H, W]` in [0, 1]."""
    return torch.from_numpy(np.stack([render(scene, profile) for scene in scenes])).permute(0, 3, 1, 2).float() / 255


def held_out(scene: Scene) -> bool:
    """Whether the scene holds a composition that training never sees: an object pair, object-background or
    object-count combination (about one in ten of each), chosen by a fixed hash of the names."""
    counts = scene.counts
    pairs = (f"pair|{a}|{b}" for a, b in combinations(sorted(counts), 2))
    grounds = (f"background|{name}|{scene.background}" for name in counts)
    numbers = (f"count|{name}|{n}" for name, n in counts.items() if n > 1)
    return any(_one_in_ten(key) for keys in (pairs, grounds, numbers) for key in keys)


def _one_in_ten(key: str) -> bool:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") % 10 == 0


class SceneGenerator:
    """Scene `i` as a pure function of (seed, i); `split`: `train` (no held-out composition), `held_out` (any) or `all`."""

    def __init__(self, profile: Profile, seed: int = 0, split: str = "train") -> None:
        if split not in ("train", "held_out", "all"):
            raise ValueError(f"unknown split {split!r}; expected 'train', 'held_out' or 'all'")
        self.profile, self.seed, self.split = profile, seed, split

    def rng(self, index: int, purpose: str = "scene") -> random.Random:
        """A generator of its own for one scene and one purpose."""
        return random.Random(f"{purpose}|{self.seed}|{self.split}|{index}")

    def scene(self, index: int, kind: str | None = None) -> Scene:
        """Scene number `index`; of a given kind if named."""
        rng = self.rng(index)
        while True:
            scene = self._draw(rng, kind or rng.choices(KINDS, self.profile.kinds)[0])
            if self.split == "all" or held_out(scene) == (self.split == "held_out"):
                return scene

    def _draw(self, rng: random.Random, kind: str) -> Scene:
        background = rng.choice(list(BACKGROUNDS))
        if kind not in KINDS:
            raise ValueError(f"unknown kind of scene {kind!r}; expected one of {KINDS}")
        placed = {"single": _single, "count": _count, "pair": _pair, "group": _group}[kind](rng, self.profile.names)
        jitter = self.profile.free_jitter
        if jitter:
            placed = [replace(o, offset=(rng.randint(-jitter, jitter), rng.randint(-jitter, jitter))) for o in placed]
        return Scene(tuple(placed), background)


def _single(rng: random.Random, names: tuple[str, ...]) -> list[SceneObject]:
    size = LARGE if rng.random() < 0.75 else MEDIUM
    last = UNITS - size
    # Middle places jitter by whole units, edges are flush: the zone stays readable from the picture.
    row, col = ((0, rng.randint(1, last - 1), last)[rng.choices(range(3), (1, 2, 1))[0]] for _ in range(2))
    return [SceneObject(rng.choice(names), row, col, size)]


def _count(rng: random.Random, names: tuple[str, ...]) -> list[SceneObject]:
    name, n = rng.choice(names), rng.randint(2, 5)
    if n == 5:
        places = [(0, 0), (0, 6), (3, 3), (6, 0), (6, 6)]
        return [SceneObject(name, row, col, SMALL) for row, col in places]
    return [SceneObject(name, row, col, MEDIUM) for row, col in _quadrants(rng, n)]


def _pair(rng: random.Random, names: tuple[str, ...]) -> list[SceneObject]:
    first, second = rng.sample(names, 2)
    across = rng.randint(0, UNITS - LARGE)  # both move together along the other axis
    if rng.random() < 0.5:
        return [SceneObject(first, across, 0, LARGE), SceneObject(second, across, LARGE, LARGE)]
    return [SceneObject(first, 0, across, LARGE), SceneObject(second, LARGE, across, LARGE)]


def _group(rng: random.Random, names: tuple[str, ...]) -> list[SceneObject]:
    """Three or four objects of two or three kinds, not all the same."""
    first, second, third = rng.sample(names, 3)
    members = rng.choice([[first, second, third], [first, first, second], [first, first, first, second]])
    members = rng.sample(members, len(members))
    return [SceneObject(name, row, col, MEDIUM) for name, (row, col) in zip(members, _quadrants(rng, len(members)))]


def _quadrants(rng: random.Random, n: int) -> list[tuple[int, int]]:
    """`n` different quarters of the picture, in reading order, shifted together by zero or one unit."""
    chosen = sorted(rng.sample([(0, 0), (0, 4), (4, 0), (4, 4)], n))
    down, right = rng.randint(0, 1), rng.randint(0, 1)
    return [(row + down, col + right) for row, col in chosen]
