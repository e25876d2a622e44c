"""From patterns to shards: braces, globs, folders and addresses, and what of it does not exist."""

from __future__ import annotations

import glob
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import braceexpand

from unidiff.addresses import is_remote, local_path, scheme
from unidiff.errors import check_regular, few, reading

ENDINGS = (
    *(".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tbz", ".tar.xz", ".txz", ".tar.lzma", ".tlz"),
    *(".tar.zst", ".tzst", ".tar.lz4", ".tar.z", ".taz"),
)
"""What a shard in a folder is called, in any case. How it is compressed is told by its content."""
MOST_SHARDS = 1_000_000
_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.(-?\d+))?")


def expand_shards(patterns: str | Sequence[str]) -> list[str]:
    """All shards that patterns name, in order.

    Args:
        patterns: one pattern or several. A pattern is a path, a folder (its files that end as a tar does), a glob (`*`, `?`,
            `[0-9]`), an http(s) or file URL, each with `{000..127}` braces; `::` separates patterns inside one string. The
            name of an existing file or folder stands for itself, whatever characters are in it. Existence is not checked.

    Raises:
        ValueError: no pattern, a scheme other than file, http and https, a folder or glob without shards, or more than
            `MOST_SHARDS` of them.
    """
    patterns = [patterns] if isinstance(patterns, str | Path) else list(patterns)
    urls: list[str] = []
    for pattern in (part for whole in patterns for part in split_patterns(str(whole))):
        if not pattern:
            raise ValueError(f"empty shard pattern in {patterns}; give a path, a brace pattern or an http(s) URL")
        check_scheme(pattern)
        for url in _braces(pattern):
            check_scheme(url)
            urls += [url] if is_remote(url) else _local(local_path(url))
            if len(urls) > MOST_SHARDS:
                raise ValueError(f"{pattern!r} names more than {MOST_SHARDS:,} shards; check its braces")
    if not urls:
        raise ValueError("no shards given; name a path, a brace pattern or an http(s) URL")
    return urls


def split_patterns(spec: str) -> list[str]:
    """The patterns of `a::b`, without surrounding spaces; an existing name with `::` in it is one."""
    return [spec] if os.path.exists(spec) else [part.strip() for part in spec.split("::")]


def check_scheme(url: str) -> None:
    """Raise ValueError unless `url` is a path, a file URL or an http(s) URL."""
    kind = scheme(url)
    if kind == "pipe" or url.strip().lower().startswith("pipe:"):
        raise ValueError(f"{url!r} is refused: a `pipe:` source runs a shell command; give a file or an http(s) URL")
    if kind not in ("", "file", "http", "https") or url == "-":
        raise ValueError(f"{url!r} is not a shard unidiff reads; give a file, a brace pattern or an http(s) URL")


def check_exist(urls: Sequence[str]) -> None:
    """Raise FileNotFoundError naming shards on this machine that do not exist. Addresses are not asked."""
    local = [url for url in urls if not is_remote(url)]
    refuse_missing([url for url in local if not os.path.exists(local_path(url))])
    for url in local:
        check_regular(local_path(url))


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
    depth, parts = 0, [""]
    for sign in inside:
        depth += (sign == "{") - (sign == "}")
        if sign == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += sign
    return sum(map(_count, parts))


def _local(path: str) -> list[str]:
    """The shards of a path: itself, those in the folder, or those that the glob finds."""
    if os.path.isdir(path):
        with reading(path, "a folder of shards"):
            names = sorted(os.listdir(path))
        found = [os.path.join(path, name) for name in names if is_shard_name(name)]
        if not found:
            shown = [name for name in names if not name.startswith(".")]
            folders = sum(os.path.isdir(os.path.join(path, name)) for name in shown)
            kinds = Counter(Path(n).suffix or "no ending" for n in shown if not os.path.isdir(os.path.join(path, n)))
            held = ", ".join(f"{count} with {kind}" for kind, count in kinds.most_common(3))
            held = ", ".join([held] * bool(held) + [f"{folders} folders"] * bool(folders)) or "nothing"
            raise ValueError(f"{path!r} holds no .tar shards (compressed or not); it holds {held}")
        return found
    if os.path.lexists(path) or not glob.has_magic(path):
        return [path]
    found = sorted(glob.glob(path))
    if not found:
        raise ValueError(f"{path!r} holds no .tar shards: no file has such a name")
    return found
