"""Pictures of any size to what an image tokenizer takes: resize the shorter side, crop the centre."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2


@dataclass(frozen=True)
class ImagePreprocess:
    """uint8 `[3, H, W]` -> float32 `[3, h, w]` in [0, 1], with sides that `factor` divides.

    Args:
        size: side of the square that comes out, the shorter side being resized to it; None keeps the picture's own
            size and crops each side to the multiple of `factor` below it.
        factor: pixels per code of the image tokenizer.

    Raises:
        ValueError: `size` is not a positive multiple of `factor`.
    """

    size: int | None
    factor: int = 1

    def __post_init__(self) -> None:
        if self.factor < 1 or (self.size is not None and (self.size < 1 or self.size % self.factor)):
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
            crop = (self.size, self.size)
            # A 1 x 10,000 strip would be resized to gigabytes first; twice the kept square leaves the result the same.
            height, width = min(height, 2 * width), min(width, 2 * height)
            image = v2.functional.center_crop(image, [height, width])
            if min(height, width) != self.size:
                scale = self.size / min(height, width)
                resized = [max(self.size, round(side * scale)) for side in (height, width)]
                image = v2.functional.resize(image, resized, InterpolationMode.BICUBIC, antialias=True)
        image = v2.functional.center_crop(image, list(crop))
        return v2.functional.to_dtype(image, torch.float32, scale=True)
