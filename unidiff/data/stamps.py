"""What shards are known by later: whether tokens still belong to the raw shards they were made from, and are whole."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from unidiff.addresses import Unreachable, is_remote, remote_stamp
from unidiff.data.shard_names import refuse_missing
from unidiff.errors import few
from unidiff.files import file_stamp

Stamp = dict[str, int | str]
"""size in bytes (-1: there is no such shard), time of change and hash, as far as they are known."""
_ASKING = 16  # addresses at a time


def source_stamps(urls: Sequence[str], allow_missing: bool = False) -> dict[str, Stamp]:
    """The stamp of every shard; of an address what its server says, which may be nothing.

    Raises:
        FileNotFoundError: shards that do not exist, unless they are allowed. OSError: one that cannot be read.
    """
    with ThreadPoolExecutor(_ASKING) as pool:
        remote = [url for url in urls if is_remote(url)]
        stamps = dict(zip(remote, pool.map(_ask, remote), strict=True))
    for url in urls:
        if url not in stamps:
            stamps[url] = dict(file_stamp(url)) if os.path.isfile(url) else {"size": -1}
    if not allow_missing:
        refuse_missing([url for url in urls if stamps[url].get("size") == -1])
    return {url: stamps[url] for url in urls}


def changes(then: Mapping[str, Stamp], now: Mapping[str, Stamp]) -> str:
    """What differs between two sets of stamps, in words; empty where nothing is known to."""
    found = []
    for url, stamp in now.items():
        before = then.get(url, {})
        both = [name for name in ("size", "time", "hash") if name in before and name in stamp]
        if other := [name for name in both if before[name] != stamp[name]]:
            found.append(f"{url} ({', '.join(_difference(name, before, stamp) for name in other)})")
    return few(found)


def token_stamp(path: str | Path) -> Stamp:
    """Size and SHA-256 of a whole token shard: folders of them are moved about, so their time says nothing."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return {"size": os.fstat(file.fileno()).st_size, "hash": digest.hexdigest()}


def damage(folder: Path, files: Mapping[str, Stamp]) -> str:
    """Which token shards of a folder are not as they were written, in words."""
    found = []
    for name, stamp in files.items():
        path = folder / name
        if not path.is_file():
            found.append(f"{name} (missing)")
        elif token_stamp(path) != stamp:
            found.append(f"{name} (other content)")
    return few(found)


def _ask(url: str) -> Stamp:
    try:
        return remote_stamp(url)
    except Unreachable as error:
        return {"size": -1} if error.gone else {}


def _difference(name: str, before: Stamp, now: Stamp) -> str:
    if name == "size":
        sizes = ["missing" if stamp["size"] == -1 else stamp["size"] for stamp in (before, now)]
        return f"size {sizes[0]} -> {sizes[1]}"
    return {"time": "changed at another time", "hash": "other content"}[name]
