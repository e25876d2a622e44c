"""The shared ids of text and image tokens (`Vocabulary`), and rows of both in one sequence (`Span`, `TokenBatch`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from enum import IntEnum
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from unidiff.schema import Index, Rows, check_fields, check_value, from_data
from unidiff.tokens.transfer import moved
from unidiff.tokens.visibility import Visibility


class Modality(IntEnum):
    """What a position holds. The values are also the rows of the modality embedding."""

    TEXT = 0
    IMAGE = 1


@dataclass(frozen=True)
class Vocabulary:
    """One shared id space for text tokens and image codes; a head restricted to a modality is the slice `text` or `image`.

    Args:
        size: rows of the embedding table and columns of the full head.
        text: half-open id range `(start, stop)` of text tokens (end-of-text included, it is a target too).
        image: half-open id range of image codes; code `c` has id `image[0] + c`. Empty `(n, n)` without images.
        mask_id: the id that replaces a hidden text token.
        image_mask_id: the id that replaces a hidden image code; `mask_id` where the family shares one [MASK].
        specials: named ids, for instance `eos`, `bos`, `pad`, `boi`.
    """

    size: Rows
    text: tuple[int, int]
    image: tuple[int, int]
    mask_id: int
    image_mask_id: int | None = None
    specials: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("text", "image"):
            if isinstance(value := getattr(self, name), list):
                object.__setattr__(self, name, tuple(value))
        check_fields(self, "vocabulary")
        for name, (start, stop) in (("text", self.text), ("image", self.image)):
            if not 0 <= start <= stop <= self.size:
                raise ValueError(f"{name} range ({start}, {stop}) must lie inside [0, {self.size}]")
        if max(self.text[0], self.image[0]) < min(self.text[1], self.image[1]):
            raise ValueError(f"text range {self.text} and image range {self.image} overlap; give them disjoint ids")
        if self.text[0] == self.text[1] and self.image[0] == self.image[1]:
            raise ValueError("vocabulary has neither text ids nor image codes; give one of the ranges some ids")
        for name, value in {"mask_id": self.mask_id, "image_mask_id": self.image_mask, **self.specials}.items():
            if not 0 <= value < self.size:
                raise ValueError(f"{name} = {value} must lie inside [0, {self.size})")
        object.__setattr__(self, "specials", MappingProxyType(dict(self.specials)))

    @classmethod
    def unified(cls, text_size: int, image_size: int, specials: Mapping[str, int] | None = None) -> Vocabulary:
        """Text ids, then [MASK], then image codes: the layout of UniDisc and of unidiff's own models."""
        start = text_size + 1
        return cls(start + image_size, (0, text_size), (start, start + image_size), text_size, specials=specials or {})

    @property
    def image_mask(self) -> int:
        """The id that hides an image code."""
        return self.mask_id if self.image_mask_id is None else self.image_mask_id

    @property
    def text_size(self) -> int:
        return self.text[1] - self.text[0]

    @property
    def image_size(self) -> int:
        return self.image[1] - self.image[0]

    def range_of(self, modality: Modality | int) -> tuple[int, int]:
        """Half-open id range of a modality, which is also the slice of the head that may predict it."""
        return self.text if modality == Modality.TEXT else self.image

    def mask_of(self, modality: Modality | int) -> int:
        """The [MASK] id of a modality."""
        return self.mask_id if modality == Modality.TEXT else self.image_mask

    def forbidden(self, modality: Modality | int) -> tuple[int, ...]:
        """Offsets inside the modality's slice that may never be emitted: a [MASK] that lies in the slice."""
        start, stop = self.range_of(modality)
        masks = sorted({self.mask_id, self.image_mask})
        return tuple(m - start for m in masks if start <= m < stop)

    def to_dict(self) -> dict:
        """Plain data for a config file; `from_dict` reads it back."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return values | {"text": list(self.text), "image": list(self.image), "specials": dict(self.specials)}

    @classmethod
    def from_dict(cls, data: Mapping) -> Vocabulary:
        """Inverse of `to_dict`; `ValueError` for unknown or missing keys, and values that do not fit (together)."""
        return from_data(cls, data, "vocabulary")

    def __reduce__(self) -> tuple:
        """For copies and other processes, which cannot take the read-only `specials`."""
        return Vocabulary.from_dict, (self.to_dict(),)


@dataclass(frozen=True)
class Span:
    """A run of tokens of one modality inside a row.

    Args:
        ids: int64 ids in the shared vocabulary, `[n]` for text or `[h, w]` for an image of any grid.
        modality: text or image.
        given: bool of the same shape, or one bool for all: True where the token is known and must not change.
        newline: id that is laid after each row of an image (text, given); None for none.
        exists: False for padding inside a row: its places are counted, but nothing sees them.
        read: what a task reads back; see `read_mask`.
    """

    ids: Tensor
    modality: Modality
    given: Tensor | bool = False
    newline: int | None = None
    exists: bool = True
    read: bool = False

    def __post_init__(self) -> None:
        known = isinstance(self.given, bool | Tensor) and isinstance(self.newline, int | None)
        if not (known and isinstance(self.ids, Tensor) and isinstance(self.modality, Modality)):
            check_fields(self, "span")  # says which
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

    @property
    def size(self) -> int:
        """Tokens, newlines included."""
        return self.ids.numel() + (0 if self.newline is None else len(self.ids))

    @classmethod
    def text(cls, ids: Sequence[int] | Tensor, given: Tensor | bool = False) -> Span:
        return cls(_whole_numbers(ids, "text"), Modality.TEXT, given)

    @classmethod
    def image(cls, ids: Tensor, given: Tensor | bool = False) -> Span:
        return cls(_whole_numbers(ids, "image"), Modality.IMAGE, given)

    @classmethod
    def words(cls, ids: Sequence[int | None], vocabulary: Vocabulary, read: bool = False) -> Span:
        """Text ids, None for a token to decode: the one place that puts text [MASK] into ids."""
        known = torch.tensor([i is not None for i in ids], dtype=torch.bool)
        filled = _whole_numbers([vocabulary.mask_id if i is None else i for i in ids], "text")
        return cls(filled, Modality.TEXT, known, read=read)

    @classmethod
    def codes(
        cls, codes: Tensor, vocabulary: Vocabulary, holes: Tensor | None = None, read: bool = False, **more: Any
    ) -> Span:
        """Image codes int64 `[h, w]` as ids, [MASK] in the holes (bool `[h, w]`); `ValueError` for a code that is none."""
        if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= vocabulary.image_size):
            raise ValueError(f"image codes must lie in [0, {vocabulary.image_size}); these reach {int(codes.max())}")
        ids, given = codes.cpu().long() + vocabulary.image[0], torch.ones_like(codes, dtype=torch.bool, device="cpu")
        if holes is not None:
            if holes.shape != codes.shape or holes.dtype != torch.bool:
                found = f"holes have shape {tuple(holes.shape)}, {holes.dtype}"
                raise ValueError(f"{found}; expected bool {tuple(ids.shape)}")
            given = ~holes.cpu()
        ids = torch.where(given, ids, vocabulary.image_mask)
        return cls(_whole_numbers(ids, "image"), Modality.IMAGE, given, read=read, **more)

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
    def from_spans(
        cls, rows: Sequence[Sequence[Span]], length: int | None = None, pad_id: int = 0, left: bool = False
    ) -> TokenBatch:
        """One row per list of spans, padded to `length` or the longest row, on the `left` so that ends agree.

        Positions count from the first token of a row. `ValueError`: no rows, an empty row, or one longer than `length`.
        """
        _check_rows(rows, Sequence[Sequence[Span]], 2)
        return cls.from_packed([[row] for row in rows], length, pad_id, left)

    @classmethod
    def from_packed(
        cls, rows: Sequence[Sequence[Sequence[Span]]], length: int | None = None, pad_id: int = 0, left: bool = False
    ) -> TokenBatch:
        """As `from_spans`, with several samples in each row: `rows[b][sample]` is a list of spans."""
        _check_rows(rows, Sequence[Sequence[Sequence[Span]]], 3)
        for name, value in (("length", length), ("pad_id", pad_id)):
            if type(value) is not int or value < 0:  # the schema is asked only for its sentence
                check_value(value, Index | None if name == "length" else Index, name)
        if not rows or any(not row or any(not sample for sample in row) for row in rows):
            raise ValueError("a TokenBatch needs at least one row, each with at least one span")
        laid = [_lay_out_row(row) for row in rows]
        longest = max(len(r[0]) for r in laid)
        length = longest if length is None else length
        if longest > length:
            raise ValueError(f"a row has {longest} tokens, more than the batch length {length}; shorten it")
        fills = (pad_id, *_FILLS)
        columns = [[_pad(r[column], length, fill, left) for r in laid] for column, fill in enumerate(fills)]
        return cls(*map(torch.stack, columns))

    @property
    def shape(self) -> tuple[int, int]:
        return self.ids.shape[0], self.ids.shape[1]

    @property
    def targets(self) -> Tensor:
        """bool `[B, L]`: valid positions that are not given, which training hides and sampling fills."""
        return self.valid & ~self.given

    def is_modality(self, modality: Modality) -> Tensor:
        """bool `[B, L]`: valid positions of a modality."""
        return self.valid & (self.modality == modality)

    def attention_mask(self) -> Tensor | None:
        """bool `[B, 1, 1, L]` or `[B, 1, L, L]`, see `visibility` and `Visibility.dense`."""
        visible = self.visibility()
        return None if visible is None else visible.dense()

    def visibility(self) -> Visibility | None:
        """Which keys a query may see (same sample, both valid); None when every row is one sample without padding."""
        sample = self.sample_ids.masked_fill(~self.valid, -1)
        alone = ((sample == sample.amax(1, keepdim=True)) | ~self.valid).all()
        unpadded, alone = torch.stack([self.valid.all(), alone]).tolist()
        return None if unpadded and alone else Visibility(sample, alone=alone)

    def replace(self, **changes: Tensor) -> TokenBatch:
        return replace(self, **changes)

    def to(self, device: torch.device | str) -> TokenBatch:
        """In one copy, see `moved`; itself on the CPU if it is there."""
        return self if self.ids.device.type == torch.device(device).type == "cpu" else moved(self, device)

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
        columns = zip((getattr(self, f.name) for f in fields(self)), (pad_id, *_FILLS), strict=True)
        return TokenBatch(*(torch.stack([_pad(row, length, fill) for row in column]) for column, fill in columns))

    @classmethod
    def cat(cls, batches: Sequence[TokenBatch]) -> TokenBatch:
        """Stack batches of any lengths along rows, padding to the longest."""
        if not isinstance(batches, list) or not all(isinstance(batch, TokenBatch) for batch in batches):
            check_value(batches, Sequence[TokenBatch], "batches")
        if not batches:
            raise ValueError("the list of batches is empty; give at least one")
        length = max(b.shape[1] for b in batches)
        padded = [b if b.shape[1] == length else b.pad_to(length) for b in batches]
        return cls(*(torch.cat([getattr(b, f.name) for b in padded]) for f in fields(cls)))

    def mask_ids(self, vocabulary: Vocabulary) -> Tensor:
        """int64 `[B, L]`: the [MASK] id of each position."""
        return torch.where(self.modality == Modality.IMAGE, vocabulary.image_mask, vocabulary.mask_id)

    def hide(self, where: Tensor, vocabulary: Vocabulary) -> TokenBatch:
        """The ids at `where`, bool `[B, L]`, replaced by their modality's [MASK]."""
        return self.replace(ids=torch.where(where, self.mask_ids(vocabulary), self.ids))

    def hide_targets(self, vocabulary: Vocabulary) -> TokenBatch:
        """Every target hidden: the state at t = 1."""
        return self.hide(self.targets, vocabulary)


_FILLS = (int(Modality.TEXT), True, False, 0, -1)  # of padding: all fields but the ids


def _check_rows(rows: Any, kind: Any, depth: int) -> None:
    """Raise `ValueError` unless `rows` are lists, so deep, of spans; the schema is asked only for its sentence."""
    level = [rows]
    for _ in range(depth):
        if not all(isinstance(part, Sequence) and not isinstance(part, str | bytes) for part in level):
            break
        level = [inner for part in level for inner in part]
    if not all(isinstance(part, Span) for part in level):
        check_value(rows, kind, "rows")


def _whole_numbers(ids: Any, what: str) -> Tensor:
    """int64 of ids in a tensor, an array or a list."""
    try:
        numbers = torch.as_tensor(ids)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{what} ids are {ids!r:.80}; expected whole numbers") from error
    if numbers.numel() and (numbers.is_floating_point() or numbers.is_complex() or numbers.dtype == torch.bool):
        raise ValueError(f"{what} ids have dtype {numbers.dtype}; expected whole numbers")
    return numbers.long()


def read_mask(rows: Sequence[Sequence[Span]], length: int, left: bool = False) -> Tensor:
    """bool `[B, length]`: the tokens of spans with `read` in rows that `from_spans` lays out, newlines not among them."""
    laid = [torch.cat([_with_newlines(torch.full(s.ids.shape, s.read), s, False) for s in row]) for row in rows]
    return torch.stack([_pad(row, length, False, left) for row in laid])


def _lay_out_row(samples: Sequence[Sequence[Span]]) -> tuple[Tensor, ...]:
    ids, modality, given, valid, positions, sample_ids = [], [], [], [], [], []
    for sample_id, spans in enumerate(samples):
        start = 0
        for span in spans:
            ids.append(_with_newlines(span.ids, span, span.newline or 0))
            n = len(ids[-1])
            known = torch.as_tensor(span.given | (not span.exists), dtype=torch.bool).expand(span.ids.shape)
            given.append(_with_newlines(known, span, True))
            modality.append(_with_newlines(torch.full(span.ids.shape, int(span.modality)), span, int(Modality.TEXT)))
            place = torch.zeros(n, 3, dtype=torch.long)
            place[:, 0] = torch.arange(start, start + n)
            if span.modality == Modality.IMAGE:
                rows, columns = torch.meshgrid(*(torch.arange(side) for side in span.ids.shape), indexing="ij")
                place[:, 1], place[:, 2] = _with_newlines(rows, span, 0), _with_newlines(columns, span, 0)
            positions.append(place)
            valid.append(torch.full((n,), span.exists))
            sample_ids.append(torch.full((n,), sample_id if span.exists else -1))
            start += n
    return tuple(torch.cat(column) for column in (ids, modality, given, valid, positions, sample_ids))


def _with_newlines(values: Tensor, span: Span, fill: int) -> Tensor:
    """Values of a span as one row, with `fill` after each line of an image that has newlines."""
    if span.newline is not None:
        values = torch.cat((values, values.new_full((len(values), 1), fill)), 1)
    return values.reshape(-1)


def _pad(values: Tensor, length: int, fill: int | bool, left: bool = False) -> Tensor:
    out = values.new_full((length, *values.shape[1:]), fill)
    out[slice(length - len(values), None) if left else slice(len(values))] = values
    return out
