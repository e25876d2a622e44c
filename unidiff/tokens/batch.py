"""`TokenBatch`: rows of text and image tokens in one sequence, with everything a model needs to place them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from unidiff.schema import Index, check_fields, check_value
from unidiff.tokens.visibility import Visibility
from unidiff.tokens.vocabulary import Modality, Vocabulary


@dataclass(frozen=True)
class Span:
    """A run of tokens of one modality inside a row.

    Args:
        ids: int64 ids in the shared vocabulary, `[n]` for text or `[h, w]` for an image of any grid.
        modality: text or image.
        given: bool of the same shape, or one bool for all: True where the token is known and must not change.
    """

    ids: Tensor
    modality: Modality
    given: Tensor | bool = False

    def __post_init__(self) -> None:
        check_fields(self, "span")
        dims = 2 if self.modality == Modality.IMAGE else 1
        if self.ids.ndim != dims or self.ids.is_floating_point() or self.ids.dtype == torch.bool:
            raise ValueError(
                f"{self.modality.name.lower()} ids have shape {tuple(self.ids.shape)} and dtype {self.ids.dtype}; expected "
                f"int64 {'[h, w], a grid' if dims == 2 else '[n]'}"
            )
        if isinstance(self.given, Tensor) and self.given.shape not in ((), self.ids.shape):
            raise ValueError(
                f"given has shape {tuple(self.given.shape)}; expected one bool, or bool {tuple(self.ids.shape)} as the ids"
            )

    @classmethod
    def text(cls, ids: Sequence[int] | Tensor, given: Tensor | bool = False) -> Span:
        return cls(_whole_numbers(ids, "text"), Modality.TEXT, given)

    @classmethod
    def image(cls, ids: Tensor, given: Tensor | bool = False) -> Span:
        return cls(_whole_numbers(ids, "image"), Modality.IMAGE, given)

    @classmethod
    def masked_text(cls, length: int, vocabulary: Vocabulary) -> Span:
        """`length` hidden text tokens."""
        check_value(length, Index, "length")
        check_value(vocabulary, Vocabulary, "vocabulary")
        return cls.text(torch.full((length,), vocabulary.mask_id))

    @classmethod
    def masked_image(cls, grid: tuple[int, int], vocabulary: Vocabulary) -> Span:
        """An `h x w` grid of hidden image codes."""
        sides = tuple(grid) if isinstance(grid, list) else grid
        check_value(sides, tuple[Index, Index], "grid")
        check_value(vocabulary, Vocabulary, "vocabulary")
        return cls.image(torch.full(sides, vocabulary.image_mask))


@dataclass(frozen=True)
class TokenBatch:
    """A batch of B rows, padded to L tokens. All tensors share `[B, L]` and a device.

    Attributes:
        ids: int64, shared-vocabulary ids; [MASK] where unknown.
        modality: int64, `Modality` values.
        given: bool, True where the token is known; the sampler never touches it and training never hides it.
        valid: bool, False on *batch padding*, which attention and loss never see. (EOS fill of a text span is valid.)
        positions: int64 `[B, L, 3]`: (index in the sample, image row, image column). Rows and columns are 0 for text.
        sample_ids: int64, names the packed sample a token belongs to; -1 on padding. Attention stays inside a sample.
    """

    ids: Tensor
    modality: Tensor
    given: Tensor
    valid: Tensor
    positions: Tensor
    sample_ids: Tensor

    @classmethod
    def from_spans(cls, rows: Sequence[Sequence[Span]], length: int | None = None, pad_id: int = 0) -> TokenBatch:
        """Lay out one row per list of spans; pad on the right to `length` or the longest row.

        Raises:
            ValueError: no rows, an empty row, or a row longer than `length`.
        """
        check_value(rows, Sequence[Sequence[Span]], "rows")
        return cls.from_packed([[row] for row in rows], length, pad_id)

    @classmethod
    def from_packed(
        cls, rows: Sequence[Sequence[Sequence[Span]]], length: int | None = None, pad_id: int = 0
    ) -> TokenBatch:
        """As `from_spans`, with several samples packed into each row: `rows[b][sample]` is a list of spans."""
        check_value(rows, Sequence[Sequence[Sequence[Span]]], "rows")
        check_value(length, Index | None, "length")
        check_value(pad_id, Index, "pad_id")
        if not rows or any(not row or any(not sample for sample in row) for row in rows):
            raise ValueError("a TokenBatch needs at least one row, each with at least one span")
        laid = [_lay_out_row(row) for row in rows]
        longest = max(len(r[0]) for r in laid)
        length = longest if length is None else length
        if longest > length:
            raise ValueError(f"a row has {longest} tokens, more than the batch length {length}; shorten it")
        fills = (pad_id, int(Modality.TEXT), True, False, 0, -1)
        columns = []
        for column, fill in enumerate(fills):
            padded = [_pad(r[column], length, fill) for r in laid]
            columns.append(torch.stack(padded))
        return cls(*columns)

    @property
    def shape(self) -> tuple[int, int]:
        return self.ids.shape[0], self.ids.shape[1]

    @property
    def targets(self) -> Tensor:
        """bool `[B, L]`: valid positions that are not given; what training hides and sampling fills."""
        return self.valid & ~self.given

    def is_modality(self, modality: Modality) -> Tensor:
        """bool `[B, L]`: valid positions of a modality."""
        return self.valid & (self.modality == modality)

    def attention_mask(self) -> Tensor | None:
        """bool `[B, 1, L, L]`, True where a query may see a key (same sample, both valid); None when all may."""
        visible = self.visibility()
        return None if visible is None else visible.dense()

    def visibility(self) -> Visibility | None:
        """Which keys a query may see (same sample, both valid); None when every row is one sample without padding."""
        if bool(self.valid.all()) and bool((self.sample_ids == self.sample_ids[:, :1]).all()):
            return None
        return Visibility(self.sample_ids.masked_fill(~self.valid, -1))

    def replace(self, **changes: Tensor) -> TokenBatch:
        return replace(self, **changes)

    def to(self, device: torch.device | str) -> TokenBatch:
        return TokenBatch(*(getattr(self, f.name).to(device) for f in fields(self)))

    def rows(self, index: Tensor | slice | Sequence[int]) -> TokenBatch:
        """The chosen rows, in that order."""
        if not isinstance(index, slice):
            index = torch.as_tensor(index, device=self.ids.device)
        return TokenBatch(*(getattr(self, f.name)[index] for f in fields(self)))

    def pad_to(self, length: int, pad_id: int = 0) -> TokenBatch:
        """Add batch padding on the right."""
        check_value(length, Index, "length")
        if length < self.shape[1]:
            raise ValueError(f"cannot pad {self.shape[1]} tokens to {length}")
        fills = (pad_id, int(Modality.TEXT), True, False, 0, -1)
        padded = (
            torch.stack([_pad(row, length, fill) for row in getattr(self, f.name)])
            for f, fill in zip(fields(self), fills, strict=True)
        )
        return TokenBatch(*padded)

    @classmethod
    def cat(cls, batches: Sequence[TokenBatch]) -> TokenBatch:
        """Stack batches of any lengths along rows, padding to the longest."""
        check_value(batches, Sequence[TokenBatch], "batches")
        if not batches:
            raise ValueError("the list of batches is empty; give at least one")
        length = max(b.shape[1] for b in batches)
        padded = [b if b.shape[1] == length else b.pad_to(length) for b in batches]
        return cls(*(torch.cat([getattr(b, f.name) for b in padded]) for f in fields(cls)))

    def hide_targets(self, vocabulary: Vocabulary) -> TokenBatch:
        """Every target replaced by its modality's [MASK]: the state at t = 1."""
        mask = torch.where(self.modality == Modality.IMAGE, vocabulary.image_mask, vocabulary.mask_id)
        return self.replace(ids=torch.where(self.targets, mask, self.ids))


def _whole_numbers(ids: Any, what: str) -> Tensor:
    """int64 of ids in a tensor, an array or a list."""
    try:
        numbers = torch.as_tensor(ids)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{what} ids are {ids!r:.80}; expected whole numbers") from error
    if numbers.numel() and (numbers.is_floating_point() or numbers.is_complex() or numbers.dtype == torch.bool):
        raise ValueError(f"{what} ids have dtype {numbers.dtype}; expected whole numbers")
    return numbers.long()


def _lay_out_row(samples: Sequence[Sequence[Span]]) -> tuple[Tensor, ...]:
    ids, modality, given, positions, sample_ids = [], [], [], [], []
    for sample_id, spans in enumerate(samples):
        start = 0
        for span in spans:
            n = span.ids.numel()
            known = torch.as_tensor(span.given, dtype=torch.bool).expand(span.ids.shape).reshape(-1)
            place = torch.zeros(n, 3, dtype=torch.long)
            place[:, 0] = torch.arange(start, start + n)
            if span.modality == Modality.IMAGE:
                height, width = span.ids.shape
                place[:, 1] = torch.arange(height).repeat_interleave(width)
                place[:, 2] = torch.arange(width).repeat(height)
            ids.append(span.ids.reshape(-1))
            modality.append(torch.full((n,), int(span.modality)))
            given.append(known)
            positions.append(place)
            sample_ids.append(torch.full((n,), sample_id))
            start += n
    total = sum(len(x) for x in ids)
    valid = torch.ones(total, dtype=torch.bool)
    return torch.cat(ids), torch.cat(modality), torch.cat(given), valid, torch.cat(positions), torch.cat(sample_ids)


def _pad(values: Tensor, length: int, fill: int | bool) -> Tensor:
    out = values.new_full((length, *values.shape[1:]), fill)
    out[: len(values)] = values
    return out
