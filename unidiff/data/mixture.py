"""Which of several weighted sources each draw uses. Shares are exact in every block of draws, and the order is a hash of (seed, block)."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from unidiff.addresses import local_path
from unidiff.data.shard_names import split_patterns

BLOCK = 1000


@dataclass(frozen=True)
class MixtureSchedule:
    """Which source draw i uses.

    Each block of 1,000 draws gives source s exactly `counts[s]` of them, its weight's share by largest remainder, in an
    order keyed by (seed, block). So the source's own draw number is known without looking at earlier blocks.

    Args:
        weights: one per source, relative.
        seed: of the order inside blocks.

    Raises:
        ValueError: no sources, a weight that is not positive, or a share below half a thousandth.
    """

    weights: tuple[float, ...]
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.weights or not all(0 < w < float("inf") for w in self.weights):
            raise ValueError(f"mixture weights {self.weights} must be positive numbers, one per source")
        if not np.isfinite(sum(self.weights)) or 0 in self.counts:
            raise ValueError(
                f"mixture weights {self.weights} give a source fewer than 1 in {BLOCK} draws; leave it out"
            )

    @property
    def counts(self) -> tuple[int, ...]:
        """Draws of each source in a block; they sum to 1,000."""
        shares = np.asarray(self.weights, dtype=np.float64) / sum(self.weights) * BLOCK
        counts = np.floor(shares).astype(int)
        for source in np.argsort(counts - shares, kind="stable")[: BLOCK - counts.sum()]:
            counts[source] += 1
        return tuple(int(c) for c in counts)

    def block(self, number: int) -> np.ndarray:
        """int64 `[1000]`: the source of each draw of a block."""
        return _block(self.counts, self.seed & 0xFFFFFFFF, number)

    def locate(self, index: int) -> tuple[int, int]:
        """(source, that source's own draw number) of draw `index`."""
        number, place = divmod(index, BLOCK)
        if len(self.weights) == 1:
            return 0, index
        sources = self.block(number)
        source = int(sources[place])
        return source, number * self.counts[source] + int((sources[:place] == source).sum())


@lru_cache(maxsize=16)
def _block(counts: tuple[int, ...], seed: int, number: int) -> np.ndarray:
    sources = np.repeat(np.arange(len(counts)), counts)
    return sources if len(counts) == 1 else np.random.default_rng([seed, number]).permutation(sources)


def parse_sources(spec: str | Sequence[str]) -> list[tuple[str, float]]:
    """Shard patterns and weights of a setting: `"a-{0..9}.tar@3 :: b.tar@1"`.

    Without any `@weight` the whole setting is one source, its patterns one after the other; with one, each pattern is a
    source and those without a weight have 1. The name of an existing file or folder that ends like a weight is a name.

    Raises:
        ValueError: nothing given, an empty pattern, or a weight that is no positive number.
    """
    parts = [p for whole in ([spec] if isinstance(spec, str) else spec) for p in split_patterns(whole)]
    if not parts or not all(parts):
        raise ValueError(f"empty shard pattern in {spec!r}; give a path, a brace pattern or an http(s) URL")
    found = [_weighted(part) for part in parts]
    if all(weight is None for _, weight in found):
        return [("::".join(parts), 1.0)]
    return [(pattern, 1.0 if weight is None else weight) for pattern, weight in found]


def _weighted(part: str) -> tuple[str, float | None]:
    """A pattern and the number behind its last @, None where that is a part of the name."""
    pattern, at, text = part.rpartition("@")
    if not at or os.path.exists(local_path(part)) or "/" in text or pattern.endswith("://"):
        return part, None
    try:
        weight = float(text)
    except ValueError as error:
        if any(sign in text for sign in ".{*?["):
            return part, None
        raise ValueError(f"{part!r} has the weight {text!r} behind @; expected a number, for instance @2") from error
    if not 0 < weight < math.inf:
        raise ValueError(f"{part!r} has the weight {text!r} behind @; expected a finite number above 0")
    if not pattern.strip():
        raise ValueError(f"{part!r} is a weight without a shard pattern; write for instance folder@2")
    return pattern.strip(), weight
