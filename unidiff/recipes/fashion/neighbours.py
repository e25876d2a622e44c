"""The training photograph that is nearest to a picture, by which copies would show."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

_AT_ONCE = 250  # pictures whose distances to all training photographs are held at once


class Nearest(NamedTuple):
    """Of each picture the place of the nearest training photograph, int64 `[N]`, and its distance, float32 `[N]`."""

    place: Tensor
    distance: Tensor


def nearest(pictures: Tensor, training: Tensor, tick: Callable[[int], None] = lambda more: None) -> Nearest:
    """By the root of the mean squared difference of pixels.

    Args:
        pictures: float32 `[N, ...]`. training: float32 `[M, ...]`, of the same sizes. tick: told how many more are done.
    """
    known = training.flatten(1)
    squares = known.square().sum(1)
    places, distances = [], []
    for part in pictures.flatten(1).split(_AT_ONCE):
        place = (squares - 2 * part @ known.T).argmin(1)  # [B]
        places.append(place)
        distances.append((part - known[place]).square().mean(1).sqrt())
        tick(len(part))
    return Nearest(torch.cat(places), torch.cat(distances))
