"""The reader of faces: finds the face whose layers give a picture, pixel for pixel, and says what it could not explain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from unidiff.worlds.faces.scenes import ATTRIBUTES, NONE, ORDER, SIDE, UNDER_A_HAT, Face, default_layers

TOLERANCE = 0.03
"""A pixel is explained where no channel is further off, as a share of full intensity."""
MOST_WRONG = 0.25
"""An attribute is read where at most so large a share of the pixels that it decides is not explained."""
_ROUNDS = 4
_START = Face("tan", "short", "brown", "ahead", "brown", "smile", NONE, NONE, NONE, "plain", "red", "blue")
_TOGETHER = (
    ("background",),
    ("skin",),
    ("hair", "hair_colour", "hat"),
    ("clothing", "clothing_colour"),
    ("eyes", "eye_colour", "glasses"),
    ("mouth", "beard"),
)
"""Attributes that are tried together: each group over all its values, the others as they are."""


@dataclass(frozen=True)
class FaceReading:
    """What is on a picture.

    Attributes:
        nearest: the face that explains most pixels. wrong: pixels of the 16 x 16 that it does not explain.
        unread: attributes that too many of their own pixels speak against.
    """

    nearest: Face
    wrong: int
    unread: frozenset[str]

    @property
    def face(self) -> Face | None:
        """The face, where all of the picture is explained."""
        return self.nearest if self.wrong == 0 else None

    def value(self, attribute: str) -> str | None:
        """The value of an attribute, or None where it cannot be read."""
        return None if attribute in self.unread else str(getattr(self.nearest, attribute))


def read_faces(pictures: Tensor, chunk: int = 256) -> list[FaceReading]:
    """Read pictures `[B, 3, H, W]` in [0, 1] whose sides are multiples of 16, by trying the values of each group in turn."""
    step = pictures.shape[-1] // SIDE
    small = F.avg_pool2d(pictures.detach().float().cpu(), step)  # [B, 3, 16, 16]
    return [reading for part in small.split(chunk) for reading in _read(part)]


def _read(pictures: Tensor) -> list[FaceReading]:
    faces = [_START] * len(pictures)
    left = torch.arange(len(pictures))
    for _ in range(_ROUNDS):
        tried = before = [faces[i] for i in left.tolist()]
        for group in _TOGETHER:
            tried = _improved(pictures[left], tried, group)
        for i, face in zip(left.tolist(), tried, strict=True):
            faces[i] = face
        whole = _explained(pictures[left], _drawn(tried)).flatten(1).all(1)
        moved = torch.tensor([old != new for old, new in zip(before, tried, strict=True)])
        left = left[~whole & moved]
        if not len(left):
            break
    explained = _explained(pictures, _drawn(faces))
    counts = (~explained).flatten(1).sum(1)
    lost = dict(
        zip((rows := counts.nonzero()[:, 0]).tolist(), _unread(explained[rows], [faces[i] for i in rows.tolist()]))
    )
    return [FaceReading(face, n, lost.get(i, frozenset())) for i, (face, n) in enumerate(zip(faces, counts.tolist()))]


def _unread(explained: Tensor, faces: Sequence[Face]) -> list[frozenset[str]]:
    """Attributes of each face that too many of the pixels that they decide speak against."""
    unread: list[set[str]] = [set() for _ in faces]
    for name in ATTRIBUTES if faces else ():
        decided, shown = torch.zeros_like(explained), _drawn(faces)
        for value in ATTRIBUTES[name]:
            others = [_changed(face, (name,), (value,)) or face for face in faces]
            decided |= (_drawn(others) - shown).abs().amax(1) > TOLERANCE
        wrong = (decided & ~explained).flatten(1).sum(1) / decided.flatten(1).sum(1).clamp_min(1)
        for lost, share in zip(unread, wrong.tolist(), strict=True):
            lost |= {name} if share > MOST_WRONG else set()
    return [frozenset(lost) for lost in unread]


def _improved(pictures: Tensor, faces: Sequence[Face], group: tuple[str, ...]) -> list[Face]:
    """The faces with the values of a group that explain most pixels; only the rows of the picture that these touch are looked at."""
    rows = _rows_of(group)
    seen = pictures[:, :, rows]
    best, kept = _explained(seen, _drawn(faces, rows)).flatten(1).sum(1), list(faces)
    for values in product(*(ATTRIBUTES[name] for name in group)):
        tried = [(i, face) for i, old in enumerate(faces) if (face := _changed(old, group, values)) is not None]
        if not tried:
            continue
        places = torch.tensor([i for i, _ in tried])
        score = _explained(seen[places], _drawn([face for _, face in tried], rows)).flatten(1).sum(1)
        for (i, face), better in zip(tried, (score > best[places]).tolist(), strict=True):
            if better:
                kept[i] = face
        best[places] = torch.maximum(best[places], score)
    return kept


@lru_cache
def _rows_of(group: tuple[str, ...]) -> slice:
    """The rows of the artwork that the layers of a group reach."""
    if "background" in group or "skin" in group:
        return slice(0, SIDE)
    reach = torch.stack([default_layers().touched(name).any(1) for name in group if name in ORDER]).any(0)  # [16]
    touched = reach.nonzero()[:, 0].tolist()
    return slice(touched[0], touched[-1] + 1)


def _drawn(faces: Sequence[Face], rows: slice = slice(0, SIDE)) -> Tensor:
    return default_layers().compose(faces, rows)


def _changed(face: Face, names: tuple[str, ...], values: tuple[str, ...]) -> Face | None:
    """A face with other values; None where the world has no such face."""
    made = face.altered(**dict(zip(names, values, strict=True)))
    if len(names) == 1 and names[0] == "hair":  # asked what this one decides: as much else stays as can
        colour = NONE if made.hair == NONE else made.hair_colour if made.hair_colour != NONE else "brown"
        made = made.altered(hair_colour=colour, hat=made.hat if made.hair in UNDER_A_HAT else NONE)
    return made if made.possible() else None


def _explained(pictures: Tensor, drawn: Tensor) -> Tensor:
    """bool `[B, 16, 16]`."""
    return (pictures - drawn).abs().amax(1) <= TOLERANCE
