"""Tiny files as Fashion-MNIST has them: ten classes that a tiny network can tell apart."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np


def idx(values: np.ndarray) -> bytes:
    """An IDX file of unsigned bytes."""
    return struct.pack(f">4B{values.ndim}I", 0, 0, 8, values.ndim, *values.shape) + values.tobytes()


def tiny_files(folder: Path, train: int, test: int, shape: tuple[int, int] = (28, 28), seed: int = 0) -> None:
    """Both splits: a bar at a height that the class says, of other lightness, width and stripes."""
    rng, (rows, columns) = np.random.default_rng(seed), shape
    for name, count in (("train", train), ("t10k", test)):
        labels = (np.arange(count) % 10).astype(np.uint8)
        pixels = np.zeros((count, rows, columns), np.uint8)
        for number, label in enumerate(labels):
            top, left = int(label) * (rows - rows // 3) // 9, int(rng.integers(1, columns // 3))
            bar = pixels[number, top : top + rows // 3, left:-left]
            bar[:] = rng.integers(80, 256)
            if rng.random() < 0.5:
                bar[:, ::2] //= 2
        (folder / f"{name}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(pixels)))
        (folder / f"{name}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
