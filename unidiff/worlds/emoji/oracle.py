"""The oracle: reads a picture of emoji sprites back into its scene by exact template matching over the atlas.

Sprites sit on the unit grid and do not overlap, so there are 110 boxes (size, row, column) a sprite can fill. For every
box the sprite with the smallest squared error, composed on the picture's background, is one matrix product. Readings are
the disjoint boxes that explain most of the picture; whatever stays unexplained, or fits no sprite within an absolute
distance, is reported as unreadable rather than as the nearest sprite.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from unidiff.worlds.emoji.scenes import BACKGROUNDS, SIZES, UNITS, Profile, Scene, SceneObject

COLOURS = torch.tensor(list(BACKGROUNDS.values()), dtype=torch.float32) / 255.0
"""Of the backgrounds, `[8, 3]`."""
READ_UNIT = 8
"""Pictures are averaged down to so many pixels per unit before they are read."""

MAX_DISTANCE = 0.03
"""Squared error per covered pixel and channel beyond which a box is unreadable; pixels run from 0 to 1.

Fixed on true pictures of the `cpu` profile before the transformer was trained (reconstructions of the tokenizer in
training were looked at, nothing that a transformer drew): the right sprite lies at most 2e-5 away
(rounding to 8 bits). The nearest *other* sprite at the same size and background lies .082 away in the median at 32 px,
.077 at 24 px and .068 at 16 px; .4 %, .6 % and 1.2 % have one nearer than .03. Of the 136 sprites that are in the atlas
but not in the profile, on all backgrounds and sizes, .4 % lie within .03 of one that is (2.2 % within .04, 6 % within
.05). What it leaves for an image tokenizer: a picture blurred to 25 dB keeps 98 % of its sprites within .03.
"""

MAX_SHARE = 0.5
"""A sprite must also be explained better than this share of its contrast: a key hardly shows on yellow."""

MAX_BACKGROUND = 0.06
"""Squared colour distance within which a pixel counts for a background; the two nearest backgrounds are .081 apart."""

MIN_BACKGROUND_SHARE = 0.2
"""Share of the pixels that must show the background; true scenes show more than .4."""

MAX_CELL = 0.006
"""Mean squared error of a unit cell outside all sprites beyond which it is not background."""


@dataclass(frozen=True)
class Reading:
    """What a reader saw.

    Attributes:
        background: its name, or None where no background colour prevails.
        objects: in reading order. distances: squared error per covered pixel of each.
        unreadable: connected regions that are neither background nor a sprite.
    """

    background: str | None
    objects: tuple[SceneObject, ...]
    distances: tuple[float, ...]
    unreadable: int

    @classmethod
    def of(cls, background: str, chosen: Sequence[tuple[SceneObject, float]], shown: np.ndarray) -> Reading:
        """Disjoint objects with their distances; units that show something (bool `[8, 8]`) outside them are unreadable."""
        found, strange = sorted(chosen, key=lambda c: (c[0].row, c[0].col)), shown.copy()
        for item, _ in found:
            strange[item.units] = False
        objects, distances = zip(*found) if found else ((), ())
        return cls(background, objects, distances, _regions(strange))

    @property
    def scene(self) -> Scene | None:
        """The scene, or None if any part of the picture is unreadable or nothing is on it."""
        if self.background is None or self.unreadable or not self.objects:
            return None
        return Scene(self.objects, self.background)


class Oracle:
    """Reads pictures of a profile. Raises `ValueError`: one with free jitter, or whose unit is no multiple of 8 pixels."""

    def __init__(self, profile: Profile) -> None:
        if profile.free_jitter:
            raise ValueError(
                f"the oracle reads sprites on the grid; free_jitter is {profile.free_jitter}, so set it to 0"
            )
        if profile.unit % READ_UNIT:
            raise ValueError(f"the oracle needs units of a multiple of {READ_UNIT} px, but they are {profile.unit} px")
        self.profile, self._shrink = profile, profile.unit // READ_UNIT
        self._sprites: dict[int, Tensor] = {}  # [N, 4, S, S] each
        for size in SIZES:
            sprites = torch.from_numpy(profile.atlas.scaled(size * profile.unit)[: profile.num_objects])
            self._sprites[size] = F.avg_pool2d(sprites.movedim(-1, 1), self._shrink)
        self._templates: dict[tuple[int, int], _Templates] = {}

    def read(self, images: np.ndarray | Tensor, chunk: int = 64) -> list[Reading]:
        """Read pictures, uint8 `[B, H, W, 3]` (numpy or torch) or float `[B, 3, H, W]` in [0, 1].

        Raises:
            ValueError: pictures of another shape or size than the profile's.
        """
        pictures = as_float_images(images)
        size = self.profile.image_size
        if pictures.shape[1:] != (3, size, size):
            raise ValueError(f"the oracle reads pictures of {size} x {size}, got {tuple(pictures.shape[2:])}")
        pictures = F.avg_pool2d(pictures, self._shrink)  # [B, 3, 64, 64]
        nearest, index = ground_distance(pictures).flatten(2).min(1)  # [B, P]
        votes = F.one_hot(index, len(BACKGROUNDS)) * (nearest < MAX_BACKGROUND)[..., None]
        share, grounds = votes.float().mean(1).max(1)  # the background colour that most pixels show
        grounds = torch.where(share >= MIN_BACKGROUND_SHARE, grounds, -1)
        readings = {row: Reading(None, (), (), 1) for row in range(len(pictures))}
        for ground in set(grounds.tolist()) - {-1}:
            for part in (grounds == ground).nonzero()[:, 0].split(chunk):
                readings |= zip(part.tolist(), self._read_on(pictures[part], ground), strict=True)
        return list(readings.values())

    def _read_on(self, pictures: Tensor, ground: int) -> list[Reading]:
        rest = pictures - COLOURS[ground][:, None, None]  # zero on background
        units = rest.square().sum(1).unfold(1, READ_UNIT, READ_UNIT).unfold(2, READ_UNIT, READ_UNIT)
        energy = units.sum((-1, -2))  # [B, 8, 8]
        matches = [self._match(rest, energy, size, ground) for size in SIZES]
        return [self._assemble(b, energy[b].numpy(), matches, ground) for b in range(len(pictures))]

    def _match(self, rest: Tensor, energy: Tensor, size: int, ground: int) -> _Matches:
        """Best sprite in every box of one size, and whether it is near enough."""
        templates = self._template(size, ground)
        side = size * READ_UNIT
        boxes = rest.unfold(2, side, READ_UNIT).unfold(3, side, READ_UNIT)  # [B, 3, R, C, S, S]
        boxes = boxes.movedim(1, 3).flatten(3)  # [B, R, C, 3 S S]
        inside = energy.unfold(1, size, 1).unfold(2, size, 1).sum((-1, -2))  # [B, R, C]
        gains, best = (2 * boxes @ templates.pixels.T - templates.energy).max(-1)  # energy explained
        distance = (inside - gains).clamp_min(0) / templates.area[best]
        near = (distance <= templates.limit[best]) & (gains > 0)
        return _Matches(size, best, gains, distance, near)

    def _template(self, size: int, ground: int) -> _Templates:
        if (size, ground) not in self._templates:
            sprites = self._sprites[size]
            pixels = (sprites[:, :3] - sprites[:, 3:] * COLOURS[ground][:, None, None]).flatten(1)
            energy, area = pixels.square().sum(1), 3 * sprites[:, 3].flatten(1).sum(1)
            limit = (MAX_SHARE * energy / area).clamp_max(MAX_DISTANCE)
            self._templates[size, ground] = _Templates(pixels, energy, area, limit)
        return self._templates[size, ground]

    def _assemble(self, b: int, energy: np.ndarray, matches: Sequence[_Matches], ground: int) -> Reading:
        candidates = []
        for m in matches:
            for row, col in m.near[b].nonzero().tolist():
                item = SceneObject(self.profile.names[int(m.best[b, row, col])], row, col, m.size)
                candidates.append((float(m.gains[b, row, col]), item, float(m.distance[b, row, col])))
        candidates = sorted(candidates, key=lambda c: -c[0])[:24]
        chosen = _best_disjoint([(gain, _box(item)) for gain, item, _ in candidates])
        shown = energy > MAX_CELL * 3 * READ_UNIT**2
        return Reading.of(list(BACKGROUNDS)[ground], [candidates[i][1:] for i in chosen], shown)


class _Templates(NamedTuple):
    pixels: Tensor  # [N, 3 S S], difference to the background
    energy: Tensor  # [N]
    area: Tensor  # [N], covered pixels times channels
    limit: Tensor  # [N]


class _Matches(NamedTuple):
    size: int
    best: Tensor  # [B, R, C]
    gains: Tensor
    distance: Tensor
    near: Tensor


def as_float_images(images: np.ndarray | Tensor) -> Tensor:
    """uint8 `[B, H, W, 3]` or float `[B, 3, H, W]` in [0, 1] -> float32 `[B, 3, H, W]` on the CPU."""
    pictures = torch.as_tensor(images).cpu()
    if pictures.ndim != 4:
        raise ValueError(f"pictures have shape {[*pictures.shape]}; expected uint8 [B, H, W, 3] or float [B, 3, H, W]")
    return pictures.movedim(-1, 1).float() / 255.0 if pictures.dtype == torch.uint8 else pictures.float()


def ground_distance(pictures: Tensor) -> Tensor:
    """Squared distance of every pixel to every background colour, `[B, 3, H, W]` -> `[B, 8, H, W]`."""
    return (pictures[:, None] - COLOURS[:, :, None, None]).square().sum(2)


def _box(item: SceneObject) -> int:
    """The units a sprite covers, as bits of an integer."""
    line = ((1 << item.size) - 1) << item.col
    return sum(line << UNITS * row for row in range(item.row, item.row + item.size))


def _best_disjoint(candidates: list[tuple[float, int]]) -> list[int]:
    """Indices of the disjoint candidates (gain, cells) of largest total gain; branch and bound, gains descending."""
    tails = [sum(gain for gain, _ in reversed(candidates[i:])) for i in range(len(candidates) + 1)]
    best: tuple[float, list[int]] = (0.0, [])

    def search(i: int, gain: float, used: int, chosen: list[int]) -> None:
        nonlocal best
        if gain > best[0]:
            best = (gain, chosen)
        if i == len(candidates) or gain + tails[i] <= best[0]:
            return
        if not candidates[i][1] & used:
            search(i + 1, gain + candidates[i][0], used | candidates[i][1], [*chosen, i])
        search(i + 1, gain, used, chosen)

    search(0, 0.0, 0, [])
    return best[1]


def _regions(strange: np.ndarray) -> int:
    """Number of 4-connected regions of a boolean grid."""
    left, count = set(map(tuple, np.argwhere(strange).tolist())), 0
    while left:
        stack, count = [left.pop()], count + 1
        while stack:
            row, col = stack.pop()
            near = left & {(row + 1, col), (row - 1, col), (row, col + 1), (row, col - 1)}
            left -= near
            stack += near
    return count
