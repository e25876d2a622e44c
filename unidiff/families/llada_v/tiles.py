"""Pictures of any size as tiles of one size, and the features of tiles as one line of features.

A picture becomes a small copy of itself, squeezed to a tile, and a canvas of as many tiles as suit its size and proportions (any
resolution, LLaVA-NeXT). Of the features, what the canvas has beside the picture is cut off, a large map is reduced, and a learned
vector ends each row of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from unidiff.families.layout import Grid

GREY = (127, 127, 127)
"""Around a picture that is made square."""
_LEAST_REDUCTION = 1.1  # maps that are too large by less stay as they are


@dataclass(frozen=True)
class Tiling:
    """How pictures become tiles.

    Args:
        side: pixels of a tile. patches: rows and columns of features of a tile.
        largest: most tiles along a side. most: as many tiles of features may be left of a canvas; None for all.
    """

    side: int
    patches: int
    largest: int
    most: int | None = None

    def grid(self, width: int, height: int) -> Grid:
        """Rows and columns of tiles for a picture: those that keep most of its pixels, then those that waste least."""
        best, found = (-1, 0), (1, 1)
        for columns in range(1, self.largest + 1):
            for rows in range(1, self.largest + 1):
                across, down = columns * self.side, rows * self.side
                scale = min(across / width, down / height)
                kept = min(int(width * scale) * int(height * scale), width * height)
                if (kept, kept - across * down) > best:
                    best, found = (kept, kept - across * down), (rows, columns)
        return found

    def tiles(self, picture: Image.Image) -> Tensor:
        """uint8 `[1 + rows * columns, 3, side, side]` of a picture in RGB: the whole one, then its parts row by row."""
        rows, columns = self.grid(*picture.size)
        across, down = columns * self.side, rows * self.side
        width, height = picture.size
        if across / width < down / height:
            size = across, min(math.ceil(height * (across / width)), down)
        else:
            size = min(math.ceil(width * (down / height)), across), down
        canvas = Image.new("RGB", (across, down))
        resized = picture.resize(size, Image.Resampling.BICUBIC)
        canvas.paste(resized, ((across - size[0]) // 2, (down - size[1]) // 2))
        parts = _pixels(canvas).unflatten(1, (rows, self.side)).unflatten(3, (columns, self.side))
        whole = _pixels(picture.resize((self.side, self.side), Image.Resampling.BICUBIC))
        return torch.cat([whole[None], parts.permute(1, 3, 0, 2, 4).flatten(0, 1)])

    def square(self, picture: Image.Image) -> Tensor:
        """uint8 `[1, 3, side, side]`: the picture in the middle of a grey square."""
        longer = max(picture.size)
        canvas = Image.new("RGB", (longer, longer), GREY)
        canvas.paste(picture, ((longer - picture.width) // 2, (longer - picture.height) // 2))
        return _pixels(canvas.resize((self.side, self.side), Image.Resampling.BICUBIC))[None]

    def joined(self, parts: Tensor, width: int, height: int) -> Tensor:
        """`[h, w, D]`: the features `[rows * columns, patches^2, D]` of a canvas as one map, of the picture alone."""
        rows, columns = self.grid(width, height)
        n = self.patches
        whole = parts.view(rows, columns, n, n, -1).transpose(1, 2).reshape(rows * n, columns * n, -1)
        if width / height > columns / rows:
            cut = (rows * n - max(1, int(height * (columns * n / width)))) // 2  # of a line, something is left
            whole = whole[cut : rows * n - cut]
        else:
            cut = (columns * n - max(1, int(width * (rows * n / height)))) // 2
            whole = whole[:, cut : columns * n - cut]
        if self.most is None:
            return whole
        times = math.sqrt(whole.shape[0] * whole.shape[1] / (self.most * n**2))
        if times <= _LEAST_REDUCTION:
            return whole
        size = max(1, int(whole.shape[0] // times)), max(1, int(whole.shape[1] // times))
        return F.interpolate(whole.permute(2, 0, 1)[None], size, mode="bilinear")[0].permute(1, 2, 0)


def _pixels(picture: Image.Image) -> Tensor:
    """uint8 `[3, h, w]`."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)
