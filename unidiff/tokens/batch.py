"""Rows of text and image tokens and of continuous features (`Span`, `TokenBatch`), and how tensors travel (`moved`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from unidiff.schema import Index, check_fields, check_value
from unidiff.tokens.visibility import Visibility
from unidiff.tokens.vocabulary import Modality, Vocabulary

T = TypeVar("T")
CONTINUOUS = -1
"""The id of a position that holds a vector of `TokenBatch.features` in place of a token."""
_ALIGNED = 16  # bytes


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
        features: float `[n, D]` or `[h, w, D]`, vectors in place of tokens; see `continuous`.
    """

    ids: Tensor
    modality: Modality
    given: Tensor | bool = False
    newline: int | None = None
    exists: bool = True
    read: bool = False
    features: Tensor | None = None

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
        if self.features is not None and (self.given is not True or self.newline is not None):
            raise ValueError("features are given, and have no newline; make their span with Span.continuous")

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
    def continuous(cls, features: Tensor, modality: Modality = Modality.TEXT) -> Span:
        """Known vectors in place of the embeddings of tokens: float `[n, D]`, or as an image `[h, w, D]`, where D is the width of
        the model. They may require gradients. `ValueError` for another shape or dtype.
        """
        dims = 3 if modality == Modality.IMAGE else 2
        if not isinstance(features, Tensor) or not features.is_floating_point() or features.ndim != dims:
            kind = (
                f"{features.dtype} {list(features.shape)}" if isinstance(features, Tensor) else type(features).__name__
            )
            expected = "[h, w, D], a grid" if dims == 3 else "[n, D]"
            raise ValueError(f"features of {modality.name.lower()} are {kind}; expected floats {expected}")
        return cls(torch.full(features.shape[:-1], CONTINUOUS), modality, True, features=features)

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
        features: float `[B, L, D]`, the vectors that stand in place of an embedding where the id is `CONTINUOUS`; elsewhere they
            do not matter. None without any. Hiding such a position puts [MASK] there, as in place of a token.
    """

    ids: Tensor
    modality: Tensor
    given: Tensor
    valid: Tensor
    positions: Tensor
    sample_ids: Tensor
    features: Tensor | None = None

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
        made = cls(*map(torch.stack, columns))
        return replace(made, features=_lay_out_features(rows, length, left))

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

    def each(self, change: Callable[[Tensor], Tensor]) -> TokenBatch:
        """All tensors changed alike; their first two dimensions are rows and positions."""
        return TokenBatch(**{name: change(value) for name, value in self.columns().items()})

    def columns(self) -> dict[str, Tensor]:
        """All tensors by name, in the order of the fields; `features` where there are any."""
        held = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in held.items() if value is not None}

    def continuous(self) -> dict[str, Tensor]:
        """`features` by name, as `Denoiser.hidden` takes them; empty without any."""
        return {} if self.features is None else {"features": self.features}

    def to(self, device: torch.device | str) -> TokenBatch:
        """In one copy, see `moved`; itself on the CPU if it is there."""
        return self if self.ids.device.type == torch.device(device).type == "cpu" else moved(self, device)

    def rows(self, index: Tensor | slice | Sequence[int]) -> TokenBatch:
        """The chosen rows, in that order."""
        if not isinstance(index, slice):
            index = torch.as_tensor(index, device=self.ids.device)
        return self.each(lambda x: x[index])

    def pad_to(self, length: int, pad_id: int = 0) -> TokenBatch:
        """Add batch padding on the right."""
        check_value(length, Index, "length")
        if length < self.shape[1]:
            raise ValueError(f"cannot pad {self.shape[1]} tokens to {length}")
        fills = zip(self.columns().items(), (pad_id, *_FILLS, 0), strict=False)
        return TokenBatch(**{name: torch.stack([_pad(row, length, fill) for row in x]) for (name, x), fill in fills})

    @classmethod
    def cat(cls, batches: Sequence[TokenBatch]) -> TokenBatch:
        """Stack batches of any lengths along rows, padding to the longest."""
        if not isinstance(batches, list) or not all(isinstance(batch, TokenBatch) for batch in batches):
            check_value(batches, Sequence[TokenBatch], "batches")
        if not batches:
            raise ValueError("the list of batches is empty; give at least one")
        length = max(b.shape[1] for b in batches)
        padded = [b if b.shape[1] == length else b.pad_to(length) for b in batches]
        held = next((b.features for b in padded if b.features is not None), None)
        if held is not None:
            none = held.new_zeros(1, 1, held.shape[-1])
            padded = [b if b.features is not None else b.replace(features=none.expand(*b.shape, -1)) for b in padded]
        return cls(**{name: torch.cat([getattr(b, name) for b in padded]) for name in padded[0].columns()})

    def mask_ids(self, vocabulary: Vocabulary) -> Tensor:
        """int64 `[B, L]`: the [MASK] id of each position."""
        return torch.where(self.modality == Modality.IMAGE, vocabulary.image_mask, vocabulary.mask_id)

    def hide(self, where: Tensor, vocabulary: Vocabulary) -> TokenBatch:
        """The ids at `where`, bool `[B, L]`, replaced by their modality's [MASK]."""
        return self.replace(ids=torch.where(where, self.mask_ids(vocabulary), self.ids))

    def hide_targets(self, vocabulary: Vocabulary) -> TokenBatch:
        """Every target hidden: the state at t = 1."""
        return self.hide(self.targets, vocabulary)


_FILLS = (int(Modality.TEXT), True, False, 0, -1)  # of padding: all fields behind the ids, but features


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


def _lay_out_features(rows: Sequence[Sequence[Sequence[Span]]], length: int, left: bool) -> Tensor | None:
    """float `[B, length, D]`: the vectors of spans at their places, 0 elsewhere; None where no span has any."""
    laid = [[span for sample in row for span in sample] for row in rows]
    held = [span.features for row in laid for span in row if span.features is not None]
    if not held:
        return None
    if len(widths := sorted({x.shape[-1] for x in held})) > 1:
        raise ValueError(f"features of one batch are {widths} wide; give all of them the width of the model")
    wide = torch.cat([x.new_zeros(1).cpu() for x in held])  # of the widest dtype
    parts = [
        [wide.new_zeros(s.size, widths[0]) if s.features is None else s.features.flatten(0, -2).to(wide) for s in row]
        for row in laid
    ]
    return torch.stack([_pad(torch.cat(row), length, 0, left) for row in parts])


def _with_newlines(values: Tensor, span: Span, fill: int) -> Tensor:
    """Values of a span as one row, with `fill` after each line of an image that has newlines."""
    if span.newline is not None:
        values = torch.cat((values, values.new_full((len(values), 1), fill)), 1)
    return values.reshape(-1)


def _pad(values: Tensor, length: int, fill: int | bool, left: bool = False) -> Tensor:
    out = values.new_full((length, *values.shape[1:]), fill)
    out[slice(length - len(values), None) if left else slice(len(values))] = values
    return out


def moved(value: T, device: torch.device | str) -> T:
    """`value` with every tensor in it on `device`: tensors, and dataclasses, tuples, lists and dicts of such.

    Several tensors travel as one buffer, in pinned memory where they go to an accelerator, so that the host waits for
    nothing; on their way to the CPU it waits once. They share that memory afterwards. Where all is there it is `value` itself.
    Tensors with gradients travel alone.
    """
    device, found = torch.device(device), dict[int, Tensor]()
    device = torch.device("cpu") if device.type == "cpu" else device  # there is one, whatever its number
    _each(value, lambda x: found.setdefault(id(x), x))
    away = {number: x for number, x in found.items() if device not in (x.device, torch.device(x.device.type))}
    here = {number: x for number, x in away.items() if not x.requires_grad}
    if not away:
        return value
    if len({x.device for x in here.values()}) != 1 or not here:
        return _each(value, lambda x: x.to(device))
    sizes = [-(-x.numel() * x.element_size() // _ALIGNED) * _ALIGNED for x in here.values()]
    packed = torch.empty(sum(sizes), dtype=torch.uint8, device=next(iter(here.values())).device)
    for x, room in zip(here.values(), packed.split(sizes), strict=True):
        _seen_as(x, room).copy_(x)
    pinned = packed.device.type == "cpu" and device.type != "mps"
    there = packed.pin_memory().to(device, non_blocking=True) if pinned else packed.to(device)
    rooms = dict(zip(here, there.split(sizes), strict=True))
    return _each(value, lambda x: _seen_as(x, rooms[id(x)]) if id(x) in rooms else x.to(device))


def _seen_as(x: Tensor, room: Tensor) -> Tensor:
    """Bytes as a tensor like `x`."""
    return room[: x.numel() * x.element_size()].view(x.dtype).view(x.shape)


def _each(value: Any, change: Callable[[Tensor], Any]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if is_dataclass(value) and not isinstance(value, type):
        return type(value)(**{f.name: _each(getattr(value, f.name), change) for f in fields(value)})
    if isinstance(value, dict):
        return {name: _each(part, change) for name, part in value.items()}
    if isinstance(value, tuple | list):
        parts = [_each(part, change) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value
