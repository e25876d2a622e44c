"""Reading the photographs: IDX files (LeCun's format of MNIST), plain or compressed with gzip."""

from __future__ import annotations

import gzip
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from unidiff.errors import check_regular, reading

CLASSES = ("t-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
_BYTES = 8  # IDX's number of the type unsigned byte
_MOST = 2**31  # bytes of a file, unpacked


@dataclass(frozen=True)
class Photographs:
    """Photographs of one split and what they show.

    Attributes:
        pixels: uint8 `[N, H, W]`, 255 is white. The files hold negatives, which `load` turns back: the cloth that is dark in
            the shop is dark here, and the ground is white.
        labels: int64 `[N]`, places in `CLASSES`.
    """

    pixels: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def tensor(self, start: int = 0, stop: int | None = None) -> Tensor:
        """float32 `[n, 3, H, W]` in [0, 1], as `unidiff shards` and the tokenizer see them."""
        grey = torch.from_numpy(self.pixels[start:stop].copy()).float() / 255
        return grey[:, None].expand(-1, 3, -1, -1).contiguous()


def read_idx(path: str | Path) -> np.ndarray:
    """The array of an IDX file of unsigned bytes: two zero bytes, 8, the number of axes, their lengths, the values.

    Raises:
        FileNotFoundError: no such file. ValueError: one that is damaged, or of another kind.
    """
    path = Path(path)
    check_regular(path)
    with reading(path, "an IDX file of unsigned bytes"):
        with open(path, "rb") as raw:
            packed = raw.read(2) == b"\x1f\x8b"
        with gzip.open(path, "rb") if packed else open(path, "rb") as file:
            data = file.read(_MOST + 1)
        if len(data) > _MOST:
            raise ValueError(f"it is longer than {_MOST} bytes")
        if data[:3] != bytes((0, 0, _BYTES)) or len(data) < 4 or len(data) < 4 + 4 * data[3]:
            raise ValueError("it does not begin as one")
        start = 4 + 4 * data[3]
        shape = np.frombuffer(data, ">u4", data[3], 4).tolist()
        if len(data) - start != math.prod(shape):
            raise ValueError(f"its head says {math.prod(shape)} values, and {len(data) - start} bytes follow")
        return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def load(folder: str | Path, split: str) -> Photographs:
    """The photographs of a split.

    Raises:
        FileNotFoundError: a file that is not there. ValueError: files that are damaged or do not belong together.
    """
    if split not in _FILES:
        raise ValueError(f"the split is {split!r}; expected {' or '.join(_FILES)}")
    (images, pixels), (names, labels) = (_found(Path(folder), name) for name in _FILES[split])
    if pixels.ndim != 3 or min(pixels.shape) < 1:
        raise ValueError(
            f"{str(images)!r} holds an array of shape {list(pixels.shape)}; expected [pictures, rows, columns]"
        )
    if labels.shape != pixels.shape[:1]:
        raise ValueError(
            f"{str(names)!r} holds labels of shape {list(labels.shape)} for the {len(pixels)} pictures of {images.name!r}; "
            "take both from one package"
        )
    if labels.max() >= len(CLASSES):
        raise ValueError(f"{str(names)!r} holds the label {labels.max()}; expected 0 to {len(CLASSES) - 1}")
    return Photographs(255 - pixels, labels.astype(np.int64))


def _found(folder: Path, name: str) -> tuple[Path, np.ndarray]:
    for path in (folder / f"{name}.gz", folder / name):
        if path.exists():
            return path, read_idx(path)
    raise FileNotFoundError(
        f"{str(folder / name)!r} (or .gz) does not exist; install Debian's dataset-fashion-mnist, or name the folder with --source"
    )
