"""Which image a token belongs to and how large that image is, read off the positions alone."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from unidiff.tokens import Modality


class ImageSpans(NamedTuple):
    """Per position, int64 `[B, L]`.

    Attributes:
        number: which image of its sample, from 0; 0 for text.
        side: rows or columns of the image, whichever are more; 1 for text.
    """

    number: Tensor
    side: Tensor


def image_spans(positions: Tensor, modality: Tensor) -> ImageSpans:
    """Images of packed rows: one begins at every image token of row 0 and column 0, a sample at every index 0.

    Args:
        positions: int64 `[B, L, 3]`: (index in the sample, image row, image column).
        modality: int64 `[B, L]`.
    """
    image = modality == Modality.IMAGE
    corner = (image & (positions[..., 1:] == 0).all(-1)).long()
    begun = corner.cumsum(1)  # images of the row begun so far
    before = torch.where(positions[..., 0] == 0, begun - corner, 0).cummax(1).values  # those of earlier samples
    number = torch.where(image, begun - 1 - before, 0).clamp_min(0)
    slot = torch.where(image, begun, 0)
    extent = positions[..., 1:].amax(-1) + 1
    side = torch.zeros_like(slot).scatter_reduce(1, slot, extent, "amax").gather(1, slot)
    return ImageSpans(number, torch.where(image, side, 1))
