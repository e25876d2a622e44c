"""What can be measured on a photograph: how light, how wide and how patterned a thing is, beside others of its class.

A word is used where the measure lies in the lower or the upper third of the training photographs of the class, and none in
between. So a narrow pair of trousers is narrow among trousers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from unidiff.recipes.fashion.photographs import CLASSES, Photographs

ATTRIBUTES = ("lightness", "width", "pattern")
_GROUND = 0.9  # pixels at least as light as this are ground
_THIRDS = (1 / 3, 2 / 3)


def measures(pixels: np.ndarray) -> np.ndarray:
    """float64 `[N, 3]` of grey pictures `[N, H, W]` in [0, 1]: a column for each of `ATTRIBUTES`.

    lightness: mean of the thing's pixels. width: its pixels for each row that it reaches into. pattern: mean difference
    of neighbouring pixels inside of it, outlines left out. A picture without a thing measures 1, 0 and 0.
    """
    x = np.asarray(pixels, np.float64)
    thing = x < _GROUND
    area = thing.sum((1, 2))
    lightness = np.where(area > 0, (x * thing).sum((1, 2)) / np.maximum(area, 1), 1.0)
    rows = thing.sum(2) > 0
    height = np.where(area > 0, rows.shape[1] - rows[:, ::-1].argmax(1) - rows.argmax(1), 1)
    inside = thing.copy()  # pixels whose four neighbours are of the thing too
    inside[:, 1:] &= thing[:, :-1]
    inside[:, :-1] &= thing[:, 1:]
    inside[:, :, 1:] &= thing[:, :, :-1]
    inside[:, :, :-1] &= thing[:, :, 1:]
    down, across = inside[:, 1:] & inside[:, :-1], inside[:, :, 1:] & inside[:, :, :-1]
    change = (np.abs(np.diff(x, axis=1)) * down).sum((1, 2)) + (np.abs(np.diff(x, axis=2)) * across).sum((1, 2))
    pairs = down.sum((1, 2)) + across.sum((1, 2))
    return np.stack([lightness, area / height, change / np.maximum(pairs, 1)], 1)


@dataclass(frozen=True)
class Thresholds:
    """Where words begin: `ends`, float64 `[classes, 3, 2]`, the ends of the lower and the upper third."""

    ends: np.ndarray

    @classmethod
    def of(cls, training: Photographs) -> Thresholds:
        """From the training split. Raises `ValueError`: a class without photographs."""
        found = measures(training.pixels / 255)
        ends = np.zeros((len(CLASSES), len(ATTRIBUTES), 2))
        for label, name in enumerate(CLASSES):
            own = found[training.labels == label]
            if not len(own):
                raise ValueError(f"the training photographs show no {name}; expected some of every class")
            ends[label] = np.quantile(own, _THIRDS, axis=0).T
        return cls(ends)

    def levels(self, pixels: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """int64 `[N, 3]`: -1 in the lower third, 1 in the upper third, 0 between, of grey pictures `[N, H, W]` in [0, 1]."""
        found, ends = measures(pixels), self.ends[labels]
        return (found > ends[..., 1]).astype(np.int64) - (found < ends[..., 0])
