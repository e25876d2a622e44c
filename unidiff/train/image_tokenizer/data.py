"""Pictures for an image tokenizer: some held out, and an endless stream of the others whose position can be saved.

Held out means that no picture of the stream has the same pixels, whatever its name and wherever it lies.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from unidiff.data.shards import ImagePreprocess, ShardSource
from unidiff.files import file_stamp
from unidiff.train.image_tokenizer.config import ImageData
from unidiff.world import WORLDS

HELD_OUT = 256
"""Validation pictures where nothing else is asked for and there are enough."""
_SHARE = 8  # else one picture in so many
_WINDOW = 1024  # samples of shards that are shuffled together
_MOST_REPEATS = 100_000  # scenes in a row that are all held out: there are no others


class PictureStream(Protocol):
    """Single pictures without end, float32 `[3, H, W]` in [0, 1]."""

    def __iter__(self) -> Iterator[Tensor]: ...

    def state(self) -> dict[str, Any]:
        """The position behind the last picture, as plain data."""

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a position. Raises ValueError where it is of other data."""


@dataclass(frozen=True)
class Pictures:
    """What a run trains on.

    Attributes:
        held_out: float32 `[N, 3, H, W]`, for validation only. stream: all others.
        facts: what the data are known by later.
    """

    held_out: Tensor
    stream: PictureStream
    facts: dict[str, str]


def open_pictures(data: ImageData, seed: int, factor: int) -> Pictures:
    """Validation pictures and a stream of others.

    Args:
        factor: pixels per code, which divide the pictures' sides.

    Raises:
        ValueError: no source or two of them, sides that do not fit, or too few pictures.
        FileNotFoundError: a shard that does not exist.
    """
    if (data.world is None) == (not data.shards):
        raise ValueError("data needs exactly one of world (its name) and shards (a list of tar files)")
    if data.world is not None:
        held_out = world_images(data, seed + 1, 0, data.validation_images or HELD_OUT)
        if (side := held_out.shape[-1]) % factor:
            raise ValueError(f"pictures of {data.profile!r} are {side} pixels wide, which factor {factor} must divide")
        digests = {digest(picture) for picture in held_out}
        return Pictures(held_out, _Scenes(data, seed, digests), {"held-out pictures": _joint(digests)})
    prepare = ImagePreprocess(data.image_size, factor)
    once = ShardSource(data.shards, ("image",), shuffle=_WINDOW, seed=seed)
    held = _first_different(once, prepare, data)
    digests = {digest(picture) for picture in held}
    source = ShardSource(data.shards, ("image",), shuffle=_WINDOW, seed=seed, repeat=True)
    facts = {"held-out pictures": _joint(digests), "data.shards": _joint(map(_content, source.shards))}
    return Pictures(torch.stack(held), _Shards(source, prepare, digests), facts)


def world_images(data: ImageData, seed: int, start: int, count: int) -> Tensor:
    """Pictures of training scenes `start .. start + count`: float `[count, 3, H, W]` in [0, 1]."""
    picture = _world_pictures(data, seed)
    return torch.stack([picture(start + i) for i in range(count)])


def _world_pictures(data: ImageData, seed: int) -> Callable[[int], Tensor]:
    return WORLDS.get_or_refuse(data.world, "data.world").pictures(data.profile, data.kinds, seed)


def digest(picture: Tensor) -> bytes:
    """What two pictures with the same pixels share."""
    return hashlib.blake2b(picture.contiguous().numpy().tobytes(), digest_size=16).digest()


def _first_different(source: ShardSource, prepare: ImagePreprocess, data: ImageData) -> list[Tensor]:
    """The first pictures to hold out, all different, if at least one other remains."""
    asked, total = data.validation_images, 0
    seen: set[bytes] = set()
    held: list[Tensor] = []
    wanted = asked or HELD_OUT
    for sample in source:
        total += 1
        picture = prepare(sample["image"])
        if (own := digest(picture)) in seen:
            continue
        seen.add(own)
        if len(held) < wanted:
            held.append(picture)
        if len(seen) > wanted and (asked or len(seen) >= _SHARE * wanted):
            return held
    if len(seen) < 2:
        skipped = f"; {source.report.brief()}" if source.report.counts else ""
        raise ValueError(
            f"data.shards hold {total} pictures, {len(seen)} of them different; at least 2 are needed, 1 to hold out{skipped}"
        )
    if asked:
        raise ValueError(
            f"data.shards hold {len(seen)} different pictures; data.validation_images={asked} would leave none to "
            f"train on: ask for at most {len(seen) - 1} (0 holds out one in {_SHARE})"
        )
    return held[: max(1, len(seen) // _SHARE)]


class _Scenes:
    def __init__(self, data: ImageData, seed: int, held_out: set[bytes]) -> None:
        self.picture, self.held_out, self.index = _world_pictures(data, seed), held_out, 0

    def __iter__(self) -> Iterator[Tensor]:
        repeats = 0
        while repeats < _MOST_REPEATS:
            picture = self.picture(self.index)
            self.index += 1
            repeats = repeats + 1 if digest(picture) in self.held_out else 0
            if not repeats:
                yield picture
        raise ValueError(f"all of {_MOST_REPEATS} scenes are held out; lower data.validation_images")

    def state(self) -> dict[str, Any]:
        return {"scene": self.index}

    def load(self, state: Mapping[str, Any]) -> None:
        if type(state.get("scene")) is not int:
            raise ValueError("the saved position is not one of scenes")
        self.index = state["scene"]


class _Shards:
    def __init__(self, source: ShardSource, prepare: ImagePreprocess, held_out: set[bytes]) -> None:
        self.source, self.prepare, self.held_out = source, prepare, held_out

    def __iter__(self) -> Iterator[Tensor]:
        for sample in self.source:  # without end: some picture is not held out
            picture = self.prepare(sample["image"])
            if digest(picture) not in self.held_out:
                yield picture

    def state(self) -> dict[str, Any]:
        return self.source.state_dict()

    def load(self, state: Mapping[str, Any]) -> None:
        try:
            self.source.load_state_dict(state)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError("the saved position is not one of shards") from error


def _content(shard: str) -> bytes:
    """What a local shard is known by, wherever it lies; of one behind an address its name."""
    if not Path(shard).is_file():
        return shard.encode()
    stamp = file_stamp(shard)
    return f"{stamp['size']} {stamp['hash']}".encode()


def stamp_of(path: Path) -> str:
    """A hash of a file of weights, to know it again."""
    return str(file_stamp(path)["hash"])


def _joint(digests: Iterable[bytes]) -> str:
    return hashlib.blake2b(b"".join(sorted(digests)), digest_size=16).hexdigest()
