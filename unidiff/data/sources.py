"""From settings to shards (braces, globs, folders, addresses, weights), and which of several weighted sources each draw uses."""

from __future__ import annotations

import glob
import math
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import braceexpand
import numpy as np

from unidiff.addresses import STORES, in_store, is_remote, listed, local_path, scheme
from unidiff.errors import check_regular, few, reading

ENDINGS = (
    *(".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tbz", ".tar.xz", ".txz", ".tar.lzma", ".tlz"),
    *(".tar.zst", ".tzst", ".tar.lz4", ".tar.z", ".taz"),
)
"""What a shard in a folder is called, in any case. How it is compressed is told by its content."""
MOST_SHARDS = 1_000_000
BLOCK = 1000
_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.(-?\d+))?")


def expand_shards(patterns: str | Sequence[str], allow_missing: bool = True) -> list[str]:
    """All shards that patterns name, in order.

    Args:
        patterns: one pattern or several. A pattern is a path, a folder (its files that end as a tar does), a glob (`*`, `?`,
            `[0-9]`), also in a store (s3://, gs://, hf://, ...), an http(s) or file URL, each with `{000..127}` braces; `::` separates patterns inside one string. The
            name of an existing file or folder stands for itself, whatever characters are in it.
        allow_missing: shards of this machine need not exist. Addresses are never asked.

    Raises:
        ValueError: no pattern, a refused scheme, a folder or glob without shards, or more than
            `MOST_SHARDS` of them.
        FileNotFoundError: shards that do not exist.
    """
    patterns = [patterns] if isinstance(patterns, str | Path) else list(patterns)
    urls: list[str] = []
    for pattern in (part for whole in patterns for part in split_patterns(str(whole))):
        if not pattern:
            raise ValueError(f"empty shard pattern in {patterns}; give a path, a brace pattern or an http(s) URL")
        check_scheme(pattern)
        for url in _braces(pattern):
            check_scheme(url)
            urls += _stored(url) if in_store(url) else [url] if is_remote(url) else _local(local_path(url))
            if len(urls) > MOST_SHARDS:
                raise ValueError(f"{pattern!r} names more than {MOST_SHARDS:,} shards; check its braces")
    if not urls:
        raise ValueError("no shards given; name a path, a brace pattern or an http(s) URL")
    if not allow_missing:
        paths = {url: local_path(url) for url in urls if not is_remote(url)}
        refuse_missing([url for url, path in paths.items() if not os.path.exists(path)])
        for path in paths.values():
            check_regular(path)
    return urls


def split_patterns(spec: str) -> list[str]:
    """The patterns of `a::b`, without surrounding spaces; an existing name with `::` in it is one."""
    return [spec] if os.path.exists(spec) else [part.strip() for part in spec.split("::")]


def check_scheme(url: str) -> None:
    """Raise ValueError unless `url` is a path, a file URL, an http(s) URL or in a store."""
    kind = scheme(url)
    if kind == "pipe" or url.strip().lower().startswith("pipe:"):
        raise ValueError(f"{url!r} is refused: a `pipe:` source runs a shell command; give a file or an http(s) URL")
    if kind not in ("", "file", "http", "https", *STORES) or url == "-":
        known = ", ".join(f"{store}://" for store in STORES[:-1])
        raise ValueError(
            f"{url!r} is not a shard unidiff reads; give a file, a brace pattern, an http(s) URL, or {known}"
        )


def refuse_missing(names: Sequence[str]) -> None:
    """Raise FileNotFoundError where there are any `names`: shards that do not exist."""
    if names:
        shown = [repr(name if len(name) <= 200 else name[:197] + "...") for name in names]
        count = f"{len(names)} shards do" if len(names) > 1 else "1 shard does"
        raise FileNotFoundError(f"{count} not exist: {few(shown)}; mend the pattern, or allow it (allow_missing)")


def is_shard_name(name: str) -> bool:
    """Whether a file is called as a tar is; hidden files are not."""
    return name.lower().endswith(ENDINGS) and not name.startswith(".")


def _braces(pattern: str) -> list[str]:
    if "{" not in pattern or os.path.exists(pattern):
        return [pattern]
    with reading(pattern, "a brace pattern", "write {000..127} or {a,b}"):
        if _count(pattern) <= MOST_SHARDS:  # the library writes every range out before it gives the first name
            return list(braceexpand.braceexpand(pattern))
    raise ValueError(f"{pattern!r} names more than {MOST_SHARDS:,} shards; check its braces")


def _count(pattern: str) -> int:
    """How many names a brace pattern stands for."""
    total, depth, start = 1, 0, 0
    for place, sign in enumerate(pattern):
        if sign == "{":
            depth += 1
            start = place + 1 if depth == 1 else start
        elif sign == "}" and depth:
            depth -= 1
            total *= _choices(pattern[start:place]) if depth == 0 else 1
    return total


def _choices(inside: str) -> int:
    """How many names stand between a pair of braces."""
    if found := _RANGE.fullmatch(inside):
        first, last, step = found.groups()
        return abs(int(last) - int(first)) // (abs(int(step or 1)) or 1) + 1
    depth, start, total = 0, 0, 0
    for place, sign in enumerate(inside):
        depth += (sign == "{") - (sign == "}")
        if sign == "," and depth == 0:
            total += _count(inside[start:place])
            start = place + 1
    return total + _count(inside[start:])


def _stored(url: str) -> list[str]:
    """As `_local`, in a store."""
    found = None if is_shard_name(url.rpartition("/")[2]) and not glob.has_magic(url) else listed(url)
    if found is None:
        return [url]
    shards = [name for name in found if is_shard_name(name.rpartition("/")[2])]
    if not shards:
        raise ValueError(f"{url!r} holds no .tar shards")
    return shards


def _local(path: str) -> list[str]:
    """The shards of a path: itself, those in the folder, or those that the glob finds."""
    if os.path.isdir(path):
        with reading(path, "a folder of shards"):
            files = sorted(Path(path).iterdir())
        found = [os.path.join(path, file.name) for file in files if is_shard_name(file.name)]
        if not found:
            shown = [file for file in files if not file.name.startswith(".")]
            kinds = Counter(file.suffix or "no ending" for file in shown if not file.is_dir())
            held = [f"{count} with {kind}" for kind, count in kinds.most_common(3)]
            if folders := len(shown) - kinds.total():
                held.append(f"{folders} folders")
            words = ", ".join(held) or "nothing"
            raise ValueError(f"{path!r} holds no .tar shards (compressed or not); it holds {words}")
        return found
    if os.path.lexists(path) or not glob.has_magic(path):
        return [path]
    found = sorted(glob.glob(path))
    if not found:
        raise ValueError(f"{path!r} holds no .tar shards: no file has such a name")
    return found


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


@dataclass(frozen=True)
class MixtureSchedule:
    """Which source draw i uses.

    Each block of 1,000 draws gives source s exactly `counts[s]` of them, its weight's share by largest remainder, in an
    order keyed by (seed, block). So the source's own draw number is known without looking at earlier blocks.

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
