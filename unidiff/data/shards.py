"""`ShardSource`: decoded samples of many tar shards, shuffled, with an exact position and an account of what is skipped; and
`ImagePreprocess`, which makes their pictures what an image tokenizer takes."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from unidiff.data import report
from unidiff.data.members import IMAGE_TYPES, check_member, decode_member, find_member, is_blank, member_type
from unidiff.data.report import Skip, SkipReport, Unusable
from unidiff.data.sources import expand_shards
from unidiff.data.tar import read_shard
from unidiff.schema import Between, from_data

_LOG = logging.getLogger(__name__)
Count = Annotated[int, Between(0)]
_IN_ORDER = 64  # samples read at a time without shuffling, so that threads have some to decode


class ShardSource:
    """Iterates over samples; each is a dict of decoded members with `__key__` and `__url__`.

    The order is a pure function of (shards, seed, epoch): shards are permuted, their samples read in order, and every
    `shuffle` consecutive ones permuted. Worker threads only decode, so their number changes nothing. The position
    can be saved between any two samples and restored, and then gives exactly the remaining samples and counts.

    Args:
        shards: see `expand_shards`.
        require: members a sample must have; `image` stands for any of `IMAGE_TYPES`. Without one, or with an empty
            `txt`, it is skipped.
        optional: members decoded when present; a damaged one makes the sample skipped too. `images` is a dict of all
            image members by name (`0.jpg`, `1.png`, ...), which belong to the `json` of the same name.
        shuffle: samples per shuffling window, held in memory undecoded; 0 keeps the order of the tars.
        repeat: start again after the last shard, with the next epoch's order.
        workers: decoding threads; 0 decodes in the caller's.
        prepare: changes a decoded sample, in those threads; an `Unusable` that it raises makes the sample skipped.
        allow_missing: shards that do not exist are counted in place of refused, as those behind addresses always are.
        announce: log what was skipped at the end of every epoch.

    Raises:
        FileNotFoundError: a shard that does not exist.
        ValueError: a refused source or member type; or, while iterating with `repeat`, an epoch without any usable sample.
    """

    def __init__(
        self,
        shards: str | Sequence[str],
        require: Sequence[str] = ("image", "txt"),
        optional: Sequence[str] = (),
        shuffle: int = 0,
        seed: int = 0,
        repeat: bool = False,
        workers: int = 0,
        prepare: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
        allow_missing: bool = False,
        announce: bool = True,
    ) -> None:
        self.prepare, self.announce = prepare, announce
        self.shards = expand_shards(shards, allow_missing)
        for name in (*require, *optional):
            check_member(name)
        if shuffle < 0 or workers < 0:
            raise ValueError(f"shuffle = {shuffle} and workers = {workers} must not be negative")
        self.require, self.optional = tuple(require), tuple(optional)
        self.shuffle, self.seed, self.repeat, self.workers = shuffle, seed, repeat, workers
        settings = [self.shards, self.require, self.optional, shuffle, seed]
        self._fingerprint = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
        self._pool = ThreadPoolExecutor(workers) if workers else None
        self._where = _Position()
        self._before = SkipReport()  # events before the current window
        self._told: set[Skip] = set()  # events that were announced
        self._reading = SkipReport()  # events met while filling it; they come again when it is refilled
        self._decoding = SkipReport()  # events met while decoding it, up to the position

    @property
    def report(self) -> SkipReport:
        """What has been skipped so far."""
        return self._before.merge(self._reading).merge(self._decoding)

    def state_dict(self) -> dict[str, Any]:
        """The position after the last sample handed out, as plain data (JSON-able)."""
        return {
            "fingerprint": self._fingerprint,
            "position": asdict(self._where),
            "before": self._before.state_dict(),
            "decoding": self._decoding.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was taken, with a new iterator. Raises ValueError for other shards, seed or window."""
        plain = from_data(_SourceState, state, "the saved position")
        if plain.fingerprint != self._fingerprint:
            raise ValueError(
                "the saved position belongs to other shards, members, seed or shuffle window; start without it"
            )
        before, decoding = SkipReport.from_state_dict(plain.before), SkipReport.from_state_dict(plain.decoding)
        self._where, self._before, self._decoding = plain.position, before, decoding
        self._reading = SkipReport()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while not self._where.finished:
            yield from self._epoch()
            if self._where.used == 0 and self.repeat:
                raise ValueError(f"no usable sample in {len(self.shards)} shards; {self.report.brief()}")
            met = {skip for skips in self.report.examples.values() for skip in skips}
            if self.announce and met - self._told:  # what every epoch meets again is said once
                _LOG.warning("epoch %d: %s", self._where.epoch, self.report.summary())
                self._told |= met
            self._where = _Position(epoch=self._where.epoch + 1, finished=not self.repeat)

    def _epoch(self) -> Iterator[dict[str, Any]]:
        where = self._where
        stream = self._raw_samples(where.epoch, where.shard, where.entry)
        size = self.shuffle or _IN_ORDER
        while True:
            window: list[dict[str, Any]] = []
            end = (where.shard, where.entry)
            for shard, entry, item in stream:
                end = (shard, entry)
                if isinstance(item, Skip):
                    self._reading.add(item)
                    continue
                for extension in item["__ignored__"]:
                    self._reading.ignore(extension)
                window.append(item)
                if len(window) >= size:
                    break
            order = self._permutation(len(window), where.epoch, where.window + 1)
            for result in self._decode_all([window[i] for i in order[where.offset :]]):
                where.offset += 1
                if isinstance(result, Skip):
                    self._decoding.add(result)
                    continue
                where.used += 1
                yield result
            if self._reading.counts or self._reading.ignored or self._decoding.counts:
                self._before = self.report
            self._reading, self._decoding = SkipReport(), SkipReport()
            where.shard, where.entry, where.window, where.offset = *end, where.window + 1, 0
            if len(window) < size:
                return

    def _raw_samples(self, epoch: int, start: int, skip: int) -> Iterator[tuple[int, int, dict[str, Any] | Skip]]:
        """(shard number in this epoch's order, entries of it read so far, entry), from a position on."""
        order = self._permutation(len(self.shards), epoch, 0)
        groups = [IMAGE_TYPES if name == "image" else (name,) for name in self.require]
        endings = self.require + self.optional
        for number in range(start, len(order)):
            items = read_shard(self.shards[order[number]], groups, skip, endings, "images" in endings)
            for entry, item in enumerate(items, skip + 1):
                yield number, entry, item
            skip = 0

    def _decode_all(self, window: list[dict[str, Any]]) -> Iterator[dict[str, Any] | Skip]:
        """Decode in order, a bounded number of samples ahead."""
        if self._pool is None:
            yield from map(self._decode, window)
            return
        pending: deque[Future[dict[str, Any] | Skip]] = deque()
        for raw in window:
            if len(pending) == 2 * self.workers:
                yield pending.popleft().result()
            pending.append(self._pool.submit(self._decode, raw))
        yield from (future.result() for future in pending)

    def _decode(self, raw: dict[str, Any]) -> dict[str, Any] | Skip:
        sample = {"__key__": raw["__key__"], "__url__": raw["__url__"]}
        try:
            for name in self.require + self.optional:
                if name == "images":
                    names = [found for found in raw if member_type(found) in IMAGE_TYPES]
                    sample[name] = {found: decode_member(found, raw[found]) for found in names}
                elif (found := find_member(raw, name)) is not None:  # `read_shard` has checked those that are required
                    sample[name] = decode_member(found, raw[found])
            if "txt" in self.require and is_blank(sample["txt"]):
                raise Unusable(report.EMPTY_CAPTION, "txt: no words")
            return sample if self.prepare is None else self.prepare(sample)
        except Unusable as error:
            return Skip(error.reason, raw["__url__"], raw["__key__"], str(error))

    def _permutation(self, count: int, epoch: int, stream: int) -> list[int]:
        if not self.shuffle:
            return list(range(count))
        return np.random.default_rng([self.seed & 0xFFFFFFFF, epoch, stream]).permutation(count).tolist()


@dataclass
class _Position:
    """Where the next sample is."""

    epoch: Count = 0
    shard: Count = 0
    entry: Count = 0  # the window's first
    window: Count = 0
    offset: Count = 0  # how many of the window have been handed out
    used: Count = 0
    finished: bool = False


@dataclass(frozen=True)
class _SourceState:
    """What `ShardSource.state_dict` gives."""

    fingerprint: str
    position: _Position
    before: dict[str, Any]
    decoding: dict[str, Any]


@dataclass(frozen=True)
class ImagePreprocess:
    """uint8 `[3, H, W]` -> float32 `[3, h, w]` in [0, 1], with sides that `factor` divides: the centre of the picture.

    Args:
        size: what comes out, the side of a square or (height, width): the picture is resized until it covers that. None
            keeps the picture's own size and crops each side to the multiple of `factor` below it.
        factor: pixels per code of the image tokenizer.

    Raises:
        ValueError: `size` is not a positive multiple of `factor`.
    """

    size: int | tuple[int, int] | None
    factor: int = 1

    def __post_init__(self) -> None:
        sides = self.size if isinstance(self.size, tuple) else (self.size or 0, self.size or 0)
        if self.factor < 1 or (self.size is not None and any(side < 1 or side % self.factor for side in sides)):
            raise ValueError(
                f"image size {self.size} must be a positive multiple of the tokenizer factor {self.factor}"
            )

    def __call__(self, image: Tensor) -> Tensor:
        if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
            raise ValueError(f"expected a uint8 image [3, H, W], got {image.dtype} {tuple(image.shape)}")
        height, width = int(image.shape[1]), int(image.shape[2])
        if self.size is None:
            crop = (height // self.factor * self.factor, width // self.factor * self.factor)
            if not min(crop):
                raise ValueError(f"image {height}x{width} is smaller than the tokenizer factor {self.factor}")
        else:
            crop = self.size if isinstance(self.size, tuple) else (self.size, self.size)
            # A 1 x 10,000 strip would be resized to gigabytes first; twice the kept part leaves the result the same.
            most = [-(-2 * a * crop[n] // crop[1 - n]) for n, a in enumerate((width, height))]
            height, width = min(height, most[0]), min(width, most[1])
            image = v2.functional.center_crop(image, [height, width])
            scale = max(crop[0] / height, crop[1] / width)
            if scale != 1:
                resized = [max(side, round(a * scale)) for side, a in zip(crop, (height, width), strict=True)]
                image = v2.functional.resize(image, resized, InterpolationMode.BICUBIC, antialias=True)
        image = v2.functional.center_crop(image, list(crop))
        return v2.functional.to_dtype(image, torch.float32, scale=True)
