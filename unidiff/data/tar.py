"""Single tar shards in the img2dataset layout (`key.jpg`, `key.txt`, `key.json`): naming, reading and writing.

webdataset opens URLs, iterates, groups and writes; this module adds what it lacks: which sample a cut tar lost, an
allow-list of schemes, and files that appear complete or not at all.
"""

from __future__ import annotations

import glob
import gzip
import os
import tarfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlparse

import braceexpand
from webdataset.gopen import Pipe, gopen
from webdataset.handlers import reraise_exception
from webdataset.tariterators import base_plus_ext, group_by_keys, tar_file_iterator
from webdataset.writer import TarWriter

from unidiff.data import report
from unidiff.data.members import ALLOWED_TYPES, encode_member, member_type
from unidiff.data.report import Skip

_BLOCK = tarfile.BLOCKSIZE
_READ_ERRORS = (tarfile.TarError, OSError, EOFError, zlib.error, ValueError)


def expand_shards(patterns: str | Sequence[str]) -> list[str]:
    """All shards that patterns name, in order.

    Args:
        patterns: one pattern or several. A pattern is a path, a folder (its `*.tar`), a glob, an http(s) or file URL,
            each with `{000..127}` braces; `::` separates patterns inside one string. Existence is not checked.

    Raises:
        ValueError: no pattern, a scheme other than file, http and https, or a folder or glob without shards.
    """
    patterns = [patterns] if isinstance(patterns, str | Path) else list(patterns)
    urls: list[str] = []
    for pattern in (part.strip() for whole in patterns for part in str(whole).split("::")):
        if not pattern:
            raise ValueError(f"empty shard pattern in {patterns}; give a path, a brace pattern or an http(s) URL")
        check_scheme(pattern)
        for url in braceexpand.braceexpand(pattern):
            check_scheme(url)
            found = [url]
            if os.path.isdir(url):
                found = sorted(glob.glob(os.path.join(glob.escape(url), "*.tar")))
            elif "*" in url and "://" not in url:
                found = sorted(glob.glob(url))
            if not found:
                raise ValueError(f"{url!r} holds no .tar shards")
            urls += found
    if not urls:
        raise ValueError("no shards given; name a path, a brace pattern or an http(s) URL")
    return urls


def check_scheme(url: str) -> None:
    """Raise ValueError unless `url` is a path, a file URL or an http(s) URL; call it before webdataset opens anything."""
    scheme = urlparse(url).scheme
    if scheme == "pipe":
        raise ValueError(f"{url!r} is refused: a `pipe:` source runs a shell command; give a file or an http(s) URL")
    if scheme not in ("", "file", "http", "https") or url == "-":
        raise ValueError(f"{url!r} is not a shard unidiff reads; give a file, a brace pattern or an http(s) URL")


def read_shard(url: str, require: Sequence[Sequence[str]] = ()) -> Iterator[dict[str, Any] | Skip]:
    """Raw samples of one shard, in order, with an entry for everything that is lost.

    Args:
        url: one element of `expand_shards`.
        require: groups of member names; a sample without any of a group's names is given as a `Skip`
            (`(("jpg", "png"), ("txt",))`: an image and a caption).

    Yields:
        dicts of bytes by member name with `__key__`, `__url__` and `__ignored__` (extensions never decoded), or a
        `Skip`. Damage ends the shard with a single `Skip`, whose key is the sample the cut went through.
    """
    check_scheme(url)
    try:
        stream = gopen(url, "rb")
    except OSError as error:
        yield Skip(report.MISSING_SHARD, url, "", str(error))
        return
    try:
        yield from _samples(url, _Download(stream) if isinstance(stream, Pipe) else stream, require)
    finally:
        with suppress(OSError, ValueError):  # a download abandoned early, or one that failed and was reported above
            stream.close()


def _samples(url: str, stream: Any, require: Sequence[Sequence[str]]) -> Iterator[dict[str, Any] | Skip]:
    if urlparse(url).path.lower().endswith((".gz", ".tgz")):
        stream = gzip.GzipFile(fileobj=stream, mode="rb")
    files = _Files(url, stream)
    last: dict[str, Any] | None = None
    for raw in group_by_keys(files, handler=files.duplicate):
        if last is not None:
            yield files.finish(last, require)
        last = raw
    if last is not None and not (files.failure and files.lost(last, require)):
        yield files.finish(last, require)
    if files.failure:
        yield files.failure


class _Download:
    """Reads all that arrived before it raises for a download that failed.

    webdataset's own `Pipe.read` raises as soon as the process has ended badly, and what it had just read is lost: of a
    short shard, everything.
    """

    def __init__(self, pipe: Pipe) -> None:
        self._pipe = pipe

    def read(self, size: int = -1) -> bytes:
        data = self._pipe.stream.read(size)
        if not data:
            self._pipe.wait_for_child()
        return data


class _Files:
    """The files of one tar for `group_by_keys`; remembers how the tar ended."""

    def __init__(self, url: str, stream: Any) -> None:
        self.url = url
        self.blocks = _Blocks(stream)
        self.failure: Skip | None = None
        self.current = ""  # the file being read; named by the time its data are
        self.done = ""  # the last file read completely
        self.duplicates: set[str] = set()
        self.loose: list[str] = []  # extensions of files that belong to no sample

    def __iter__(self) -> Iterator[dict[str, Any]]:
        try:
            for file in tar_file_iterator(self.blocks, handler=reraise_exception, select_files=self._note):
                self.done = self.current
                if base_plus_ext(file["fname"])[0] is None:
                    self.loose.append(member_type(file["fname"]) if "." in file["fname"] else "")
                    continue
                yield {**file, "__url__": self.url}
            problem = self.blocks.problem()
        except _READ_ERRORS as error:
            problem = (str(error).splitlines() or [type(error).__name__])[0].split(" @ ")[0]
        if problem:
            self.failure = self._classify(problem)

    def _note(self, name: str) -> bool:
        self.current = name
        return True

    def _classify(self, problem: str) -> Skip:
        if not self.blocks.count:
            remote = urlparse(self.url).scheme in ("http", "https")
            reason = report.MISSING_SHARD if remote else report.UNREADABLE_SHARD
            return Skip(reason, self.url, "", "nothing could be read" if remote else "the file is empty")
        if not self.current:
            return Skip(report.UNREADABLE_SHARD, self.url, "", problem)
        cut = self.current if self.current != self.done else ""
        return Skip(report.TRUNCATED_SHARD, self.url, base_plus_ext(cut)[0] or "", problem)

    def lost(self, sample: dict[str, Any], require: Sequence[Sequence[str]]) -> bool:
        """Whether the last sample before the damage is incomplete; then it is part of the damage, not a second case."""
        assert self.failure is not None
        key = sample["__key__"]
        incomplete = self.failure.key == key or any(not any(n in sample for n in names) for names in require)
        if incomplete:
            self.failure = Skip(self.failure.reason, self.url, key, self.failure.detail)
        return incomplete

    def duplicate(self, error: Exception) -> bool:
        """webdataset's handler: the second of two equal names. The sample is left out when it is complete."""
        self.duplicates.add(base_plus_ext(self.done)[0] or "")
        return True

    def finish(self, sample: dict[str, Any], require: Sequence[Sequence[str]]) -> dict[str, Any] | Skip:
        key = sample["__key__"]
        if key in self.duplicates:
            self.duplicates.discard(key)
            return Skip(report.DUPLICATE_MEMBER, self.url, key, "two members have the same name")
        for names in require:
            if not any(name in sample for name in names):
                return Skip(report.MISSING_MEMBER, self.url, key, f"no {' or '.join(names)}")
        others = [name for name in sample if not name.startswith("__") and member_type(name) not in ALLOWED_TYPES]
        ignored = [member_type(name) for name in others] + self.loose
        self.loose = []
        return {name: value for name, value in sample.items() if name not in others} | {"__ignored__": ignored}


class _Blocks:
    """Hands a stream to tarfile block by block, so that the block it stopped at is known.

    tarfile ends silently at a damaged header or at the end of a cut file; a whole tar ends at a block of zeros.
    """

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.count = 0
        self.last = b""

    def read(self, size: int = -1) -> bytes:
        block = self.stream.read(_BLOCK)
        while 0 < len(block) < _BLOCK:  # short reads of a network stream
            more = self.stream.read(_BLOCK - len(block))
            if not more:
                break
            block += more
        self.last = block
        self.count += bool(block)
        return block

    def problem(self) -> str:
        """What is wrong with the end of the tar; empty if nothing."""
        if len(self.last) < _BLOCK:
            return "the file ends without an end-of-archive mark"
        if any(self.last):
            return "damaged header"
        while rest := self.stream.read(1 << 16):
            if any(rest):
                return "data after the end-of-archive mark"
        return ""


class ShardWriter:
    """Writes samples to numbered tars, each of which appears complete or not at all.

    Args:
        folder: created when missing.
        samples_per_shard: a new shard starts after this many.
        start: number of the first shard.

    Attributes:
        written: `{file name: samples}` of the finished shards.

    Use as a context manager: leaving it by an error discards the unfinished shard.
    """

    def __init__(self, folder: str | Path, samples_per_shard: int = 1000, start: int = 0) -> None:
        if samples_per_shard < 1:
            raise ValueError(f"samples_per_shard = {samples_per_shard} must be at least 1")
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.samples_per_shard = samples_per_shard
        self.number = start
        self.written: dict[str, int] = {}
        self._tar: TarWriter | None = None
        self._file: Any = None
        self._keys: set[str] = set()

    @property
    def _path(self) -> Path:
        return self.folder / f"{self.number:05d}.tar"

    @property
    def _temporary(self) -> Path:
        return self.folder / f".{self.number:05d}.{os.getpid()}.tmp"

    def write(self, key: str, members: Mapping[str, Any]) -> None:
        """Add one sample; values are encoded by `encode_member`.

        Raises:
            ValueError: a key with a dot or a repeated key, no members, or a member type that is not allowed.
        """
        if not key or "." in key.rsplit("/", 1)[-1] or key.startswith("__"):
            raise ValueError(f"key {key!r} must be non-empty, without dots and not start with __")
        if key in self._keys:
            raise ValueError(f"key {key!r} is already in this shard; keys must be unique")
        if not members:
            raise ValueError(f"sample {key!r} has no members")
        encoded = {name: encode_member(name, value) for name, value in members.items()}
        if self._tar is None:
            self._file = open(self._temporary, "wb")  # noqa: SIM115 (lives until the shard is full)
            self._tar = TarWriter(
                self._file, encoder=False, mtime=0
            )  # an int: a float would add a PAX header to every member
        self._tar.write({"__key__": key, **encoded})
        self._keys.add(key)
        if len(self._keys) == self.samples_per_shard:
            self.finish()

    def finish(self) -> None:
        """Complete the current shard, if it holds anything, and go on to the next number."""
        if self._tar is None:
            return
        self._tar.close()
        self._file.close()
        os.replace(self._temporary, self._path)
        self.written[self._path.name] = len(self._keys)
        self._tar, self._file, self._keys = None, None, set()
        self.number += 1

    def discard(self) -> None:
        """Drop the unfinished shard."""
        if self._tar is not None:
            self._tar.close()
            self._file.close()
            self._temporary.unlink(missing_ok=True)
            self._tar, self._file, self._keys = None, None, set()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.finish()
        else:
            self.discard()
