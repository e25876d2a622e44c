"""Rows of the LLaDA-like families: text and images as pieces of one 1-D sequence, padded on either side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from unidiff.tokens import Modality, TokenBatch, Vocabulary


class Piece(NamedTuple):
    """A part of a row, all `[n]`: int64 ids, modality, bool given, and `[n, 2]` row and column of image codes."""

    ids: Tensor
    modality: Tensor
    given: Tensor
    place: Tensor


def text_piece(ids: Sequence[int], given: Tensor | bool = True) -> Piece:
    """Text ids."""
    values = torch.tensor([int(i) for i in ids], dtype=torch.long)
    known = torch.as_tensor(given, dtype=torch.bool).expand(values.shape)
    return Piece(values, torch.full_like(values, int(Modality.TEXT)), known, values.new_zeros(len(values), 2))


def hidden_text(length: int, vocabulary: Vocabulary) -> Piece:
    """`length` text tokens to decode."""
    return text_piece([vocabulary.mask_id] * length, False)


def image_piece(ids: Tensor, given: Tensor | bool = True, newline: int | None = None) -> Piece:
    """Image ids `[h, w]` in raster order, with a newline id (text, given) after each row if asked for."""
    height, width = ids.shape
    place = torch.cartesian_prod(torch.arange(height), torch.arange(width)).view(height, width, 2)
    known = torch.as_tensor(given, dtype=torch.bool).expand(ids.shape)
    modality = torch.full_like(ids, int(Modality.IMAGE))
    if newline is not None:
        ends = ids.new_full((height, 1), newline)
        ids, modality = torch.cat((ids, ends), 1), torch.cat((modality, torch.full_like(ends, int(Modality.TEXT))), 1)
        known = torch.cat((known, torch.ones_like(ends, dtype=torch.bool)), 1)
        place = torch.cat((place, place.new_zeros(height, 1, 2)), 1)
    return Piece(ids.flatten(), modality.flatten(), known.flatten(), place.reshape(-1, 2))


def pieces_batch(rows: Sequence[Sequence[Piece]], left: bool = False, length: int | None = None) -> TokenBatch:
    """Rows of pieces as a batch whose positions count valid tokens from 0.

    Args:
        left: pad on the left (ends agree) instead of the right.
        length: of all rows; None for the longest.

    Raises:
        ValueError: no rows, or a row longer than `length`.
    """
    if not rows:
        raise ValueError("no rows given; pass at least one prompt")
    joined = [Piece(*(torch.cat(column) for column in zip(*row, strict=True))) for row in rows]
    longest = max(len(row.ids) for row in joined)
    length = longest if length is None else length
    if longest > length:
        raise ValueError(f"a row has {longest} tokens, more than {length}; shorten its prompt")
    shape = (len(rows), length)
    ids, modality = torch.zeros(shape, dtype=torch.long), torch.full(shape, int(Modality.TEXT))
    given, valid = torch.ones(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
    positions = torch.zeros(*shape, 3, dtype=torch.long)
    for number, row in enumerate(joined):
        count = len(row.ids)
        here = slice(length - count, length) if left else slice(count)
        ids[number, here], modality[number, here], given[number, here] = row.ids, row.modality, row.given
        valid[number, here] = True
        positions[number, here, 0], positions[number, here, 1:] = torch.arange(count), row.place
    return TokenBatch(ids, modality, given, valid, positions, torch.where(valid, 0, -1))
