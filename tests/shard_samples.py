"""Small sample sets for the shard tests."""

import io
import tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unidiff.data.members import encode_member
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
