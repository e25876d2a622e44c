"""Sizes of the pictures that Lumina-DiMOO reads and edits."""

from __future__ import annotations

UNIT, FACTOR = 32, 16  # pixels: of a crop's steps, of a code
LARGEST_RATIO = 4


def lumina_grid(height: int, width: int, pixels: int = 1024) -> tuple[int, int]:
    """Rows and columns of codes for a picture of any size: the crop that upstream chooses.

    Crops have sides in multiples of 32 pixels (two codes), at most `pixels`^2 in all and a ratio of at most 4. Of those
    on the border of what fits, the one that keeps the most of the picture's shape is taken; of equals the wider one.

    Args:
        height, width: in pixels. pixels: side of the largest square, a multiple of 32 (1024 to read, 512 to edit).

    Raises:
        ValueError: a size that is not positive, or `pixels` that is no multiple of 32.
    """
    if min(height, width) < 1 or pixels < UNIT or pixels % UNIT:
        raise ValueError(
            f"picture of {height}x{width} pixels in at most {pixels}^2; expected positive sizes and a multiple of {UNIT}"
        )
    most = (pixels // UNIT) ** 2
    border = {(w, h) for w in range(1, most + 1) for h in range(most // (w + 1), most // w + 1) if h}
    shapes = [shape for shape in border if max(shape) <= LARGEST_RATIO * min(shape)]

    def fit(shape: tuple[int, int]) -> tuple[float, int, int]:
        scales = shape[0] / width, shape[1] / height
        return min(scales) / max(scales), *shape

    columns, rows = max(shapes, key=fit)
    return rows * UNIT // FACTOR, columns * UNIT // FACTOR
