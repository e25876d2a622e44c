"""Small sample sets for the shard tests."""

import io
import tarfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unidiff.data import report
from unidiff.data.members import IMAGE_TYPES, encode_member
from unidiff.data.tar import ShardWriter


def picture(seed: int, height: int = 12, width: int = 16) -> Tensor:
    """A smooth uint8 picture [3, H, W] that differs from seed to seed."""
    generator = torch.Generator().manual_seed(seed)
    small = torch.rand(1, 3, 3, 4, generator=generator)
    large = torch.nn.functional.interpolate(small, (height, width), mode="bilinear")[0]
    return (large * 255).round().to(torch.uint8)


def sample(number: int) -> dict:
    """Members of a good sample; the image type changes from one to the next."""
    kind = ("png", "jpg", "webp")[number % 3]
    return {kind: picture(number), "txt": f"caption {number}", "json": {"qa": [["which?", str(number)]], "n": number}}


def write_samples(folder: Path, count: int, per_shard: int = 10, change=None) -> list[str]:
    """`count` samples in shards; `change(number, members)` may damage one. Returns the keys."""
    keys = []
    with ShardWriter(folder, per_shard) as writer:
        for number in range(count):
            members = {name: encode_member(name, value) for name, value in sample(number).items()}
            if change is not None:
                members = change(number, members)
            keys.append(f"{number:06d}")
            writer.write(keys[-1], members)
    return keys


def write_tar(path: Path, files: list[tuple[str, bytes]]) -> None:
    """A tar with any file names, bypassing the writer's checks."""
    with tarfile.open(path, "w") as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def truncate(path: Path, size: int) -> None:
    """Keep the first `size` bytes."""
    data = path.read_bytes()
    path.write_bytes(data[:size])


@dataclass(frozen=True)
class DamagedSet:
    """Damaged shards: their pattern, the good samples in order, the bad ones by reason, and how often each is reported."""

    pattern: str
    good: list[int]
    named: dict[str, set[int]]
    counts: dict[str, int]


@dataclass(frozen=True)
class Damage:
    """What is wrong with a set of shards: samples by number, a vanished shard, and the sample whose shard ends within it.

    `truncated`: half of the picture's bytes; `bad_caption` and `bad_json`: not UTF-8; `no_caption` and `no_image`: member
    missing; `empty_shard`: one more shard, of no bytes.
    """

    truncated: Collection[int]
    bad_caption: Collection[int]
    no_caption: Collection[int]
    no_image: Collection[int]
    vanished: int
    cut: int
    bad_json: Collection[int] = ()
    empty_shard: bool = False

    def write(self, folder: Path, count: int, per_shard: int) -> DamagedSet:
        """`count` samples in shards of `per_shard`, damaged."""
        write_samples(folder, count, per_shard, self._change)
        shards = -(-count // per_shard)
        (folder / f"{self.vanished:05d}.tar").unlink()
        cut = folder / f"{self.cut // per_shard:05d}.tar"
        truncate(cut, cut.read_bytes().index(f"{self.cut:06d}.txt".encode()) // 512 * 512 + 512 + 4)
        if self.empty_shard:
            (folder / f"{shards:05d}.tar").write_bytes(b"")
        after_cut = range(self.cut, min((self.cut // per_shard + 1) * per_shard, count))
        gone = {*range(self.vanished * per_shard, (self.vanished + 1) * per_shard), *after_cut}
        named = {
            report.CORRUPT_IMAGE: {*self.truncated} - {*self.no_image} - gone,
            report.BAD_CAPTION: {*self.bad_caption} - gone,
            report.BAD_JSON: {*self.bad_json} - gone,
            report.MISSING_MEMBER: {*self.no_caption, *self.no_image} - gone,
            report.TRUNCATED_SHARD: {self.cut},
        }
        counts = {reason: len(numbers) for reason, numbers in named.items() if numbers} | {report.MISSING_SHARD: 1}
        if self.empty_shard:
            counts[report.UNREADABLE_SHARD] = 1
        lost = gone.union(*named.values())
        pattern = str(folder / f"{{00000..{shards - 1 + self.empty_shard:05d}}}.tar")
        return DamagedSet(pattern, [number for number in range(count) if number not in lost], named, counts)

    def _change(self, number: int, members: dict) -> dict:
        kind = next(name for name in IMAGE_TYPES if name in members)
        if number in self.truncated:
            members[kind] = members[kind][: len(members[kind]) // 2]
        if number in self.bad_caption:
            members["txt"] = b"caf\xe9 \xff"
        if number in self.bad_json:
            members["json"] = b'{"qa": [["which?", "\xff"]]}'
        if number in self.no_caption:
            del members["txt"]
        if number in self.no_image:
            del members[kind]
        return members


class MeanColourTokenizer:
    """An ImageEncoder without weights: each 4 x 4 cell's mean grey level, in 64 steps."""

    factor = 4
    codebook_size = 64

    def encode(self, images: Tensor) -> Tensor:
        cells = torch.nn.functional.avg_pool2d(images, self.factor).mean(1)  # [B, h, w]
        return (cells * (self.codebook_size - 1)).round().long()


def png_bytes(mode: str, value) -> bytes:
    """A 4 x 4 PNG of one colour in a PIL mode."""
    buffer = io.BytesIO()
    if mode == "I;16":
        Image.fromarray(np.full((4, 4), value, dtype=np.uint16)).save(buffer, "PNG")
    else:
        Image.new(mode, (4, 4), value).save(buffer, "PNG")
    return buffer.getvalue()


def skipped_keys(account: report.SkipReport, reason: str) -> list[str]:
    """Keys of the samples that a report names under a reason; whole shards have none."""
    return [skip.key for skip in account.examples.get(reason, []) if skip.key]
