"""Lumina-DiMOO (arXiv 2510.06308): LLaDA's network under LLaDA's names (`unidiff.families.llada`), with images between newlines.

An image of h x w codes is h rows of w codes, each followed by a newline id, in one text-like sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor

from unidiff.tokens import Modality, TokenBatch, Vocabulary

UNIT, FACTOR = 32, 16  # pixels: of a crop's steps, of a code
LARGEST_RATIO = 4


def lumina_batch(ids: Tensor, vocabulary: Vocabulary, valid: Tensor | None = None) -> TokenBatch:
    """Rows as the network sees them: a 1-D sequence in which masked places are image codes and the rest is given.

    Args:
        ids: int64 `[B, L]`, image places masked or filled.
        vocabulary: Lumina's layout (`Vocabulary.named("lumina")`).
        valid: bool `[B, L]`, False on padding, which may lie left; None for no padding. Positions count valid tokens.
    """
    valid = torch.ones_like(ids, dtype=torch.bool) if valid is None else valid
    masked = (ids == vocabulary.image_mask) & valid
    start, stop = vocabulary.image
    image = masked | ((ids >= start) & (ids < stop) & valid)
    modality = torch.where(image, int(Modality.IMAGE), int(Modality.TEXT))
    positions = ids.new_zeros(*ids.shape, 3)
    positions[..., 0] = (valid.long().cumsum(1) - 1).clamp_min(0)
    return TokenBatch(ids, modality, ~masked, valid, positions, torch.where(valid, 0, -1))


def lumina_pair(ids: Tensor, prefix: Tensor, code_start: int, vocabulary: Vocabulary) -> tuple[TokenBatch, TokenBatch]:
    """The conditional rows and the unconditional ones of the same image places, for `Sampler(..., unconditional=...)`.

    The unconditional sequence is its own prompt followed by the conditional one from the image's opening ids on
    (answer and image marks, the two ids before `code_start`). Both are right-aligned, so that the image places agree;
    the shorter one gets padding on the left.

    Args:
        ids: int64 `[B, L]`, the conditional sequence. prefix: int64 `[B, P]`, the unconditional prompt.
        code_start: index of the first image code in `ids`.
    """
    tail = ids[:, code_start - 2 :]
    rows = [ids, torch.cat((prefix, tail), dim=1)]
    length = max(row.shape[1] for row in rows)
    batches = []
    for row in rows:
        pad = length - row.shape[1]
        valid = torch.arange(length, device=ids.device) >= pad
        padded = torch.nn.functional.pad(row, (pad, 0))
        batches.append(lumina_batch(padded, vocabulary, valid.expand_as(padded)))
    return batches[0], batches[1]


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
