"""The shared ids of text and image tokens (`Vocabulary`), and the two modalities."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import IntEnum
from types import MappingProxyType

from unidiff.schema import Rows, check_fields, from_data


class Modality(IntEnum):
    """What a position holds. The values are also the rows of the modality embedding."""

    TEXT = 0
    IMAGE = 1


@dataclass(frozen=True)
class Vocabulary:
    """One shared id space for text tokens and image codes; a head restricted to a modality is the slice `text` or `image`.

    Args:
        size: rows of the embedding table and columns of the full head.
        text: half-open id range `(start, stop)` of text tokens (end-of-text included, it is a target too).
        image: half-open id range of image codes; code `c` has id `image[0] + c`. Empty `(n, n)` without images.
        mask_id: the id that replaces a hidden text token.
        image_mask_id: the id that replaces a hidden image code; `mask_id` where the family shares one [MASK].
        specials: named ids, for instance `eos`, `bos`, `pad`, `boi`.
        others: half-open id ranges of further codes that the network has rows for and that no task reads or draws, by name
            (`speech`).
    """

    size: Rows
    text: tuple[int, int]
    image: tuple[int, int]
    mask_id: int
    image_mask_id: int | None = None
    specials: Mapping[str, int] = field(default_factory=dict)
    others: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("text", "image"):
            if isinstance(value := getattr(self, name), list):
                object.__setattr__(self, name, tuple(value))
        check_fields(self, "vocabulary")
        for name, (start, stop) in (("text", self.text), ("image", self.image)):
            if not 0 <= start <= stop <= self.size:
                raise ValueError(f"{name} range ({start}, {stop}) must lie inside [0, {self.size}]")
        for name, (start, stop) in self.others.items():
            if not max(self.text[1], self.image[1]) <= start < stop <= self.size:
                raise ValueError(
                    f"{name} range ({start}, {stop}) must lie behind text and image, inside [0, {self.size}]"
                )
        if max(self.text[0], self.image[0]) < min(self.text[1], self.image[1]):
            raise ValueError(f"text range {self.text} and image range {self.image} overlap; give them disjoint ids")
        if self.text[0] == self.text[1] and self.image[0] == self.image[1]:
            raise ValueError("vocabulary has neither text ids nor image codes; give one of the ranges some ids")
        for name, value in {"mask_id": self.mask_id, "image_mask_id": self.image_mask, **self.specials}.items():
            if not 0 <= value < self.size:
                raise ValueError(f"{name} = {value} must lie inside [0, {self.size})")
        for name in ("specials", "others"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))

    @classmethod
    def unified(cls, text_size: int, image_size: int, specials: Mapping[str, int] | None = None) -> Vocabulary:
        """Text ids, then [MASK], then image codes: the layout of UniDisc and of unidiff's own models."""
        start = text_size + 1
        return cls(start + image_size, (0, text_size), (start, start + image_size), text_size, specials=specials or {})

    @property
    def image_mask(self) -> int:
        """The id that hides an image code."""
        return self.mask_id if self.image_mask_id is None else self.image_mask_id

    @property
    def text_size(self) -> int:
        return self.text[1] - self.text[0]

    @property
    def image_size(self) -> int:
        return self.image[1] - self.image[0]

    def range_of(self, modality: Modality | int) -> tuple[int, int]:
        """Half-open id range of a modality, which is also the slice of the head that may predict it."""
        return self.text if modality == Modality.TEXT else self.image

    def mask_of(self, modality: Modality | int) -> int:
        """The [MASK] id of a modality."""
        return self.mask_id if modality == Modality.TEXT else self.image_mask

    def forbidden(self, modality: Modality | int) -> tuple[int, ...]:
        """Offsets inside the modality's slice that may never be emitted: a [MASK] that lies in the slice."""
        start, stop = self.range_of(modality)
        masks = sorted({self.mask_id, self.image_mask})
        return tuple(m - start for m in masks if start <= m < stop)

    def to_dict(self) -> dict:
        """Plain data for a config file; `from_dict` reads it back."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        others = {name: list(ids) for name, ids in values.pop("others").items()}
        more = {"others": others} if others else {}
        return values | {"text": list(self.text), "image": list(self.image), "specials": dict(self.specials)} | more

    @classmethod
    def from_dict(cls, data: Mapping) -> Vocabulary:
        """Inverse of `to_dict`; `ValueError` for unknown or missing keys, and values that do not fit (together)."""
        return from_data(cls, data, "vocabulary")

    def __reduce__(self) -> tuple:
        """For copies and other processes, which cannot take the read-only `specials`."""
        return Vocabulary.from_dict, (self.to_dict(),)
