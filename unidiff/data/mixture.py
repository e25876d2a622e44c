"""Several weighted sources as one stream. Shares are exact in every block of draws, and the order is a hash of (seed, block)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np

BLOCK = 1000


class ResumableSource(Protocol):
    """What a mixture needs of a source; `ShardSource` is one."""

    def __iter__(self) -> Iterator[dict[str, Any]]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


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
        if 0 in self.counts:
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
    source and those without a weight have 1.

    Raises:
        ValueError: nothing given, or an empty pattern.
    """
    parts = [p.strip() for whole in ([spec] if isinstance(spec, str) else spec) for p in whole.split("::")]
    if not parts or not all(parts):
        raise ValueError(f"empty shard pattern in {spec!r}; give a path, a brace pattern or an http(s) URL")
    found = [re.fullmatch(r"(.+)@(\d+(?:\.\d+)?)", part) for part in parts]
    if not any(found):
        return [("::".join(parts), 1.0)]
    return [(m[1], float(m[2])) if m else (part, 1.0) for m, part in zip(found, parts, strict=True)]


class MixedSource:
    """Draws from several resumable sources by weight, until all are exhausted.

    A source that ends is left out from then on; the others go on in the same relative order. The position is exact.

    Args:
        sources: the sources.
        weights: one per source, relative.
        seed: of the order.
    """

    def __init__(self, sources: Sequence[ResumableSource], weights: Sequence[float], seed: int = 0) -> None:
        if len(sources) != len(weights):
            raise ValueError(f"{len(sources)} sources but {len(weights)} weights; give one weight per source")
        self.sources = list(sources)
        self.schedule = MixtureSchedule(tuple(float(w) for w in weights), seed)
        self._draw = 0
        self._done: set[int] = set()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        streams = [iter(source) for source in self.sources]
        while len(self._done) < len(streams):
            block = self.schedule.block(self._draw // BLOCK)
            source = int(block[self._draw % BLOCK])
            self._draw += 1
            if source in self._done:
                continue
            sample = next(streams[source], None)
            if sample is None:
                self._done.add(source)
            else:
                yield sample

    def state_dict(self) -> dict[str, Any]:
        """The position after the last sample handed out, as plain data."""
        states = [source.state_dict() for source in self.sources]
        weights = list(self.schedule.weights)
        return {"draw": self._draw, "done": sorted(self._done), "weights": weights, "sources": states}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was taken.

        Raises:
            ValueError: the state belongs to other sources or weights.
        """
        if list(state["weights"]) != list(self.schedule.weights):
            raise ValueError(f"the saved position has weights {state['weights']}, not {list(self.schedule.weights)}")
        for source, saved in zip(self.sources, state["sources"], strict=True):
            source.load_state_dict(saved)
        self._draw, self._done = int(state["draw"]), set(state["done"])
