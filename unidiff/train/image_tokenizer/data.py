"""Pictures for an image tokenizer: some held out, and an endless stream of the others whose position can be saved.

Held out means that no picture of the stream has the same pixels, whatever its name and wherever it lies.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unidiff.data.collect import size_of
from unidiff.data.shards import ImagePreprocess, ShardSource
from unidiff.files import file_stamp
from unidiff.schema import check_value
from unidiff.train.image_tokenizer.config import ImageData
from unidiff.world import WORLDS

HELD_OUT = 256
"""Validation pictures where nothing else is asked for and there are enough."""
_SHARE = 8  # else one picture in so many
_WINDOW = 1024  # samples of shards that are shuffled together
_MOST_REPEATS = 100_000  # scenes in a row that are all held out: there are no others


class _Scenes:
    """Pictures of a world one after the other, with the methods of `ShardSource`."""

    def __init__(self, picture: Callable[[int], Tensor]) -> None:
        self.picture, self.scene = picture, 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while True:
            self.scene += 1
            yield {"image": self.picture(self.scene - 1)}

    def state_dict(self) -> dict[str, Any]:
        return {"scene": self.scene}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        check_value(state.get("scene"), int, "the saved scene")
        self.scene = state["scene"]


class Pictures(NamedTuple):
    """What a run trains on, in [0, 1]."""

    held_out: Tensor  # float32 [N, 3, H, W], for validation only
    source: _Scenes | ShardSource  # of samples without end, whose position can be saved
    facts: dict[str, str]  # what the data are known by later

    def stream(self) -> Iterator[Tensor]:
        """Single pictures without end, float32 `[3, H, W]`, none of which is held out."""
        held_out, repeats = {digest(picture) for picture in self.held_out}, 0
        for sample in self.source:
            repeats = repeats + 1 if digest(sample["image"]) in held_out else 0
            if not repeats:
                yield sample["image"]
            elif repeats == _MOST_REPEATS:
                raise ValueError(f"all of {_MOST_REPEATS} pictures are held out; lower data.validation_images")


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
        facts = {"held-out pictures": _joint({digest(picture) for picture in held_out})}
        return Pictures(held_out, _Scenes(_world_pictures(data, seed)), facts)
    preprocess = ImagePreprocess(data.image_size or size_of(data.shards), factor)

    def prepare(sample: dict[str, Any]) -> dict[str, Any]:
        return sample | {"image": preprocess(sample["image"])}

    once, source = (
        ShardSource(data.shards, ("image",), shuffle=_WINDOW, seed=seed, repeat=repeat, prepare=prepare)
        for repeat in (False, True)
    )
    held = _first_different(once, data)
    facts = {"held-out pictures": _joint({digest(picture) for picture in held})}
    return Pictures(torch.stack(held), source, facts | {"data.shards": _joint(map(_content, source.shards))})


def world_images(data: ImageData, seed: int, start: int, count: int) -> Tensor:
    """Pictures of training scenes `start .. start + count`: float `[count, 3, H, W]` in [0, 1]."""
    picture = _world_pictures(data, seed)
    return torch.stack([picture(start + i) for i in range(count)])


def _world_pictures(data: ImageData, seed: int) -> Callable[[int], Tensor]:
    return WORLDS.get_or_refuse(data.world, "data.world").pictures(data.profile, data.kinds, seed)


def digest(picture: Tensor) -> bytes:
    """What two pictures with the same pixels share."""
    return hashlib.blake2b(picture.contiguous().numpy().tobytes(), digest_size=16).digest()


def _first_different(source: ShardSource, data: ImageData) -> list[Tensor]:
    """The first pictures to hold out, all different, if at least one other remains."""
    asked, total = data.validation_images, 0
    seen: set[bytes] = set()
    held: list[Tensor] = []
    wanted = asked or HELD_OUT
    for sample in source:
        total += 1
        own = digest(sample["image"])
        if own not in seen and len(held) < wanted:
            held.append(sample["image"])
        seen.add(own)
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


def _content(shard: str) -> bytes:
    """What a local shard is known by, wherever it lies; of one behind an address its name."""
    if not Path(shard).is_file():
        return shard.encode()
    stamp = file_stamp(shard)
    return f"{stamp['size']} {stamp['hash']}".encode()


def _joint(digests: Iterable[bytes]) -> str:
    return hashlib.blake2b(b"".join(sorted(digests)), digest_size=16).hexdigest()
