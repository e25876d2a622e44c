"""Single tar shards in the img2dataset layout (`key.jpg`, `key.txt`, `key.json`): reading and writing."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from webdataset.writer import TarWriter

from unidiff.addresses import Unreachable, download, is_remote, local_path
from unidiff.data import report
from unidiff.data.members import encode_member
from unidiff.data.report import Skip, Unusable, printable
from unidiff.data.sources import check_scheme
from unidiff.data.tar_index import READ_ERRORS, Group, Index, group, read, scan
from unidiff.errors import first_line, writing
from unidiff.files import replacing

_IN_MEMORY = 64 * 2**20  # a compressed or downloaded shard up to this size needs no temporary file
_COMPRESSED: dict[bytes, Callable[..., Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\0": lzma.open,
    b"]\0\0": lzma.open,  # .lzma, the older form of .xz
}
_UNREADABLE = {
    b"\x28\xb5\x2f\xfd": "is compressed with zstd; unpack it with `zstd -d`",
    b"\x04\x22\x4d\x18": "is compressed with lz4; unpack it with `lz4 -d`",
    b"\x1f\x9d": "is compressed with compress; unpack it with `uncompress`",
    b"PK\3\4": "is a zip, not a tar; unpack it and pack it again with `tar -cf`",
    b"7z\xbc\xaf": "is a 7z, not a tar; unpack it and pack it again with `tar -cf`",
    b"Rar!": "is a rar, not a tar; unpack it and pack it again with `tar -cf`",
}


def read_shard(
    url: str,
    require: Sequence[Sequence[str]] = (),
    start: int = 0,
    endings: Sequence[str] = (),
    documents: bool = False,
) -> Iterator[dict[str, Any] | Skip]:
    """Raw samples of one shard, in the order of their first files, with an entry for everything that is lost.

    A shard is a tar, plain or compressed with gzip, bzip2 or xz, whatever it is called. Files of a sample may lie anywhere in
    it; `unidiff.data.tar_index.group` says which belong together. Hard and symbolic links inside of the tar are followed.

    Args:
        url: one element of `expand_shards`.
        require: groups of member names; a sample without any of a group's names is given as a `Skip`
            (`(("jpg", "png"), ("txt",))`: an image and a caption).
        start: entries to leave out at the beginning.
        endings, documents: see `group`.

    Yields:
        dicts of bytes by member name with `__key__`, `__url__` and `__ignored__` (types never decoded), or a `Skip`.
        Damage ends the shard with a single `Skip`, whose key is the sample the cut went through.
    """
    check_scheme(url)
    name = printable(url)
    with ExitStack() as stack:
        try:
            stream, problem = _open(url, stack)
        except Unusable as error:
            yield from [Skip(error.reason, name, "", str(error))][start:]
            return
        index = scan(stream)
        groups, loose = group(index.files, endings, documents)
        entries = _entries(name, replace(index, problem=problem or index.problem), groups, loose, require)
        if any(isinstance(entry, Group) for entry in entries[:start]):
            loose = []
        for entry in entries[start:]:
            item = entry if isinstance(entry, Skip) else _read(stream, name, entry)
            if isinstance(item, dict):
                item["__ignored__"] += loose
                loose = []
            yield item


def _entries(
    url: str, index: Index, groups: Sequence[Group], loose: Sequence[str], require: Sequence[Sequence[str]]
) -> list[Group | Skip]:
    """What can be read, in order, and what is lost: several times for a sample that is there several times."""
    last = index.files[-1] if index.files else None
    failure = None
    if index.problem:
        words = index.problem if index.size else "the file is empty"
        failure = Skip(report.TRUNCATED_SHARD if last else report.UNREADABLE_SHARD, url, "", words)
    elif not groups and loose:
        types = ", ".join(sorted({kind or "no ending" for kind in loose}))
        failure = Skip(report.EMPTY_SHARD, url, "", f"{len(loose)} files, none of a sample ({types})")
    entries: list[Group | Skip] = []
    for sample in groups:
        lost = _why_lost(url, sample, require)
        if failure and last and (lost or last.end > index.size) and any(file is last for _, file in sample.members):
            failure = replace(failure, key=sample.key)  # part of the damage, not a second case
        else:
            entries += lost or [sample]
    return entries if failure is None else [*entries, failure]


def _why_lost(url: str, sample: Group, require: Sequence[Sequence[str]]) -> list[Skip]:
    """An entry for each copy of a sample that cannot be read; none for one that can."""
    names = [name for name, _ in sample.members]
    if len(set(names)) < len(names):
        copies = min(map(names.count, names))
        return [Skip(report.DUPLICATE_MEMBER, url, sample.key, "two members have the same name")] * copies
    details = [f"no {' or '.join(wanted)}" for wanted in require if not any(name in names for name in wanted)]
    details += [f"{name} {file.problem}" for name, file in sample.members if file.problem]
    return [Skip(report.MISSING_MEMBER, url, sample.key, detail) for detail in details[:1]]


def _read(stream: IO[bytes], url: str, sample: Group) -> dict[str, Any] | Skip:
    item: dict[str, Any] = {"__key__": sample.key, "__url__": url, "__ignored__": list(sample.ignored)}
    for name, file in sample.members:
        try:
            item[name] = read(stream, file)
        except READ_ERRORS as error:
            return Skip(report.MISSING_MEMBER, url, sample.key, f"{name} cannot be read ({first_line(error)})")
        if len(item[name]) < file.length:
            return Skip(report.MISSING_MEMBER, url, sample.key, f"{name} is cut")
    return item


def _open(url: str, stack: ExitStack) -> tuple[IO[bytes], str]:
    """A seekable, unpacked stream of a shard, and what went wrong while it was fetched or unpacked."""
    problem = ""
    stream: IO[bytes]
    try:
        if is_remote(url):
            stream = _spool(stack)
            try:
                download(url, stream)
            except Unreachable as error:
                problem = str(error)
                if not stream.tell():
                    raise Unusable(report.MISSING_SHARD, problem) from error
        else:
            path = local_path(url)
            if os.path.exists(path) and not os.path.isfile(path):
                raise Unusable(report.UNREADABLE_SHARD, "it is no ordinary file")
            stream = stack.enter_context(open(path, "rb"))  # noqa: SIM115 (the stack closes it)
        stream.seek(0)
        head = stream.read(8)
        stream.seek(0)
    except OSError as error:
        raise Unusable(report.MISSING_SHARD, error.strerror or str(error)) from error
    for magic, words in _UNREADABLE.items():
        if head.startswith(magic):
            raise Unusable(report.UNREADABLE_SHARD, words)
    opener = next((opener for magic, opener in _COMPRESSED.items() if head.startswith(magic)), None)
    if opener is None:
        return stream, problem
    unpacked = _spool(stack)
    return unpacked, _unpack(opener, stream, unpacked) or problem


def _unpack(opener: Callable[..., Any], packed: IO[bytes], out: IO[bytes]) -> str:
    """Write all that can be unpacked; what went wrong."""
    with opener(packed, "rb") as stream:
        while True:
            try:
                piece = stream.read1(1 << 20)  # read() would lose what comes before a fault
            except (*READ_ERRORS, lzma.LZMAError) as error:
                return first_line(error)
            if not piece:
                return ""
            with writing(f"{tempfile.gettempdir()} (where compressed shards are unpacked)"):
                out.write(piece)


def _spool(stack: ExitStack) -> Any:
    return stack.enter_context(tempfile.SpooledTemporaryFile(_IN_MEMORY))


class ShardWriter:
    """Writes samples to numbered tars in `folder`, each of which appears complete or not at all.

    A context manager: leaving it by an error discards the unfinished shard. `start` is the number of the first one;
    `written` holds `{file name: samples}` of the finished ones.
    """

    def __init__(self, folder: str | Path, samples_per_shard: int = 1000, start: int = 0) -> None:
        if samples_per_shard < 1:
            raise ValueError(f"samples_per_shard = {samples_per_shard} must be at least 1")
        self.folder = Path(folder)
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        self.samples_per_shard = samples_per_shard
        self.number = start
        self.written: dict[str, int] = {}
        self._tar: TarWriter | None = None
        self._open = ExitStack()
        self._keys: set[str] = set()

    def write(self, key: str, members: Mapping[str, Any]) -> None:
        """Add one sample, encoded by `encode_member`. Raises ValueError for a key with a dot, a repeated one, or no members."""
        if not key or "." in key.rsplit("/", 1)[-1] or key.startswith("__"):
            raise ValueError(f"key {key!r} must be non-empty, without dots and not start with __")
        if key in self._keys:
            raise ValueError(f"key {key!r} is already in this shard; keys must be unique")
        if not members:
            raise ValueError(f"sample {key!r} has no members")
        encoded = {name: encode_member(name, value) for name, value in members.items()}
        path = self._path()
        with writing(path):
            if self._tar is None:
                temporary = self._open.enter_context(replacing(path))
                file = self._open.enter_context(open(temporary, "wb"))  # noqa: SIM115 (closed with the shard)
                self._tar = TarWriter(file, encoder=False, mtime=0)  # an int: a float would add PAX headers
            self._tar.write({"__key__": key, **encoded})
        self._keys.add(key)
        if len(self._keys) == self.samples_per_shard:
            self.finish()

    def finish(self) -> None:
        """Complete the current shard, if it holds anything, and go on to the next number."""
        if self._tar is None:
            return
        path = self._path()
        with writing(path):
            self._tar.close()
            self._open.close()
        self.written[path.name] = len(self._keys)
        self._tar, self._keys = None, set()
        self.number += 1

    def _path(self) -> Path:
        return self.folder / f"{self.number:05d}.tar"

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is None:
            self.finish()
        elif self._tar is not None:
            with suppress(OSError):  # a full disk
                self._tar.close()
            with suppress(OSError):
                self._open.__exit__(kind, error, trace)
            self._tar, self._keys = None, set()
