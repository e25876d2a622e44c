"""`RowDecode`: a decode of one row with a fixed quota, whose passes are known beforehand, and the work of a pass."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from math import ceil
from typing import Annotated, NamedTuple

import torch

from unidiff.decoding.commit.base import BlockShares
from unidiff.models.denoiser import DenoiserTraits, LayerWork
from unidiff.schema import Between, check_fields
from unidiff.tokens import Modality


@dataclass(frozen=True)
class RowWork:
    """What one pass of one row does: positions through the matrices of each layer, keys that every query looks at, and
    positions whose logits are wanted (`head`), over how many ids.
    """

    layers: tuple[LayerWork, ...]
    keys: int
    head: int = 0
    ids: int = 0

    @classmethod
    def even(cls, layers: int, queries: int, keys: int, head: int = 0, ids: int = 0) -> RowWork:
        """The same positions in every layer; `queries = keys` is a full pass."""
        return cls((LayerWork(queries, queries, queries),) * layers, keys, head, ids)

    def narrowed(self, wanted: int) -> RowWork:
        """With at most so many positions behind the last layer."""
        last = self.layers[-1]
        return replace(self, layers=(*self.layers[:-1], replace(last, out=min(last.out, wanted))))

    def flops(self, traits: DenoiserTraits) -> int:
        """Layers, attention and head."""
        pairs = zip(traits.layers, self.layers, strict=True)
        return sum(f.linear(w) + f.attention(w, self.keys) for f, w in pairs) + traits.head_flops(self.head, self.ids)


@dataclass(frozen=True)
class TokenRun:
    """A run of tokens of one modality: given, or to be decoded, each as one of `ids` ids."""

    tokens: Annotated[int, Between(0, 2**26)]
    ids: Annotated[int, Between(0, 2**26)] = 0
    modality: Modality = Modality.TEXT
    given: bool = False

    def __post_init__(self) -> None:
        check_fields(self, "segment")


@dataclass(frozen=True)
class RowDecode:
    """A decode of one row: text first, block after block, with a fixed quota.

    Args:
        segments: the row from left to right. block: targets per block.
        passes: per full block, a whole number or a fraction (steps x block / targets, for a decode of so many steps).
            Shorter blocks take their share, and none more passes than it has tokens, see `BlockShares`.

    Raises:
        ValueError: nothing to decode, a block that would reach from one segment into another, or no passes.
    """

    segments: tuple[TokenRun, ...]
    block: Annotated[int, Between(1, 2**26)]
    passes: int | Fraction

    def __post_init__(self) -> None:
        check_fields(self, "row decode")
        if self.passes <= 0:
            raise ValueError(f"row decode passes is {self.passes}; expected more than 0")
        for modality in Modality:
            inner = self.hidden(modality)[:-1]
            if broken := [s for s in inner if s.tokens % self.block]:
                raise ValueError(
                    f"a segment of {broken[0].tokens} tokens is no whole number of blocks of {self.block}; only the last "
                    "of a modality may be"
                )
        if not self.targets:
            raise ValueError("a row decode needs a segment that is not given")

    def hidden(self, modality: Modality) -> list[TokenRun]:
        """Segments of a modality that are not given."""
        return [s for s in self.segments if s.modality == modality and not s.given]

    @property
    def length(self) -> int:
        return sum(s.tokens for s in self.segments)

    @property
    def targets(self) -> int:
        return sum(s.tokens for s in self.segments if not s.given)

    @property
    def prompt(self) -> int:
        """Given tokens."""
        return self.length - self.targets

    @property
    def blocks(self) -> list[tuple[int, int, int]]:
        """(first place in the row, tokens, ids) of each block, in the order of decoding."""
        found: list[tuple[Modality, int, int, int]] = []
        start = 0
        for s in self.segments:
            if not s.given:
                for offset in range(0, s.tokens, self.block):
                    found.append((s.modality, start + offset, min(self.block, s.tokens - offset), s.ids))
            start += s.tokens
        return [block[1:] for block in sorted(found, key=lambda block: block[0])]

    def steps(self, modality: Modality) -> int:
        """Passes of a whole modality: what `ModalityDecoding.steps` has to be."""
        return ceil(self.passes * sum(s.tokens for s in self.hidden(modality)) / Fraction(self.block))

    def passes_of(self, modality: Modality) -> list[int]:
        """Passes of each block of a modality, in the order of decoding."""
        size = sum(s.tokens for s in self.hidden(modality))
        shares = BlockShares(self.steps(modality), torch.tensor([size]), self.block, capped=True)
        return [int(shares.own(torch.tensor([k]))) for k in range(-(-size // self.block))]


class RowMoment(NamedTuple):
    """Where a row's decode stands before a pass.

    number: passes made. inside: passes made in the block. start, size, ids: of the block. masked: open positions of the
    block; left: of the row. changed: tokens that the last pass wrote.
    """

    number: int
    inside: int
    start: int
    size: int
    ids: int
    masked: int
    left: int
    changed: int


def moments(decode: RowDecode) -> Iterator[RowMoment]:
    """The passes of a decode with a fixed quota: a block of n in s passes takes n // s each, one more in the first n % s."""
    number, left, changed = 0, decode.targets, 0
    passes = [n for modality in Modality for n in decode.passes_of(modality)]
    for (start, size, ids), own in zip(decode.blocks, passes, strict=True):
        masked = size
        for inside in range(own):
            yield RowMoment(number, inside, start, size, ids, masked, left, changed)
            changed = size // own + (inside < size % own)
            number, masked, left = number + 1, masked - changed, left - changed
