"""What is in a tar: its files, where their bytes lie, which sample each belongs to, and how the tar ended.

Looking at all names before anything is read makes the order of files free, links followed and dotted names whole.
"""

from __future__ import annotations

import io
import posixpath
import tarfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import IO

from unidiff.data.members import ALLOWED_TYPES, IMAGE_TYPES, member_type
from unidiff.data.report import printable
from unidiff.errors import first_line

MOST_BYTES = 2**30
"""Largest member that is read: a sparse file of a few bytes can claim any size."""
TOKEN_MEMBERS = ("codes.npy", "text.npy", "questions.npy", "answer_start.npy", "tokens.npy", "images.npy")
"""Endings of two parts; of any other file, the ending is what follows its last dot."""
NO_SAMPLE = "system files"
_BLOCK = tarfile.BLOCKSIZE
READ_ERRORS = (tarfile.TarError, OSError, EOFError, zlib.error, ValueError, OverflowError, ArithmeticError, LookupError)


@dataclass
class File:
    """`place` and `size` of a file's bytes, or `problem`: why there are none."""

    name: str
    place: int = 0
    size: int = 0
    problem: str = ""
    sparse: tarfile.TarInfo | None = None

    @property
    def end(self) -> int:
        return self.place + self.size

    @property
    def length(self) -> int:
        """Bytes of the file, of a sparse one with its holes."""
        return self.size if self.sparse is None else self.sparse.size


@dataclass
class Group:
    """The files of one sample: `(member name, file)`, and the endings of those that are never decoded."""

    key: str
    members: list[tuple[str, File]] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)


@dataclass
class Index:
    """Everything in a tar of `size` bytes: its files in order, links followed, folders left out.

    `problem` says what is wrong with the tar; the last file is then incomplete if it ends behind `size`.
    """

    files: list[File]
    problem: str
    size: int


def scan(stream: IO[bytes]) -> Index:
    """Read the headers of a tar in a seekable stream."""
    size = stream.seek(0, 2)
    stream.seek(0)
    files: list[File] = []
    links: list[tuple[File, str]] = []
    problem, place = "", 0
    try:
        bounded = _Bounded(stream, size)
        with tarfile.open(fileobj=bounded, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
            while (info := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # it would keep them all
                if tar.offset <= place:
                    raise tarfile.TarError("damaged header")
                place = tar.offset
                if not info.isdir():
                    files.append(_file(info, links))
            problem = _ending(stream, tar.offset, size)
    except READ_ERRORS as error:
        problem = first_line(error)
    _follow(links, {posixpath.normpath(file.name): file for file in files if not file.problem})
    return Index(files, problem, size)


def read(stream: IO[bytes], file: File) -> bytes:
    """The bytes of a file without a `problem`; fewer than `size` where the stream ends before."""
    if file.sparse is not None:
        stream.seek(0)
        with tarfile.open(fileobj=stream, mode="r:") as tar:
            part = tar.extractfile(file.sparse)
            return b"" if part is None else part.read()
    stream.seek(file.place)
    return stream.read(file.size)


def group(files: Sequence[File], endings: Sequence[str] = (), documents: bool = False) -> tuple[list[Group], list[str]]:
    """Files by sample, in the order of each sample's first file, and the types of files that belong to none.

    The key of a sample is the name of its files without their endings, which are what follows the last dot, one of the
    `TOKEN_MEMBERS` or of `endings`; capitals in endings do not matter. Files of other types join the sample with the longest
    fitting name. System files of macOS and names without a dot belong to no sample.

    Args:
        documents: pictures join the document, by its `json`, with the longest fitting name: `key.0.jpg` belongs to `key.json`.
    """
    two_part = tuple(f".{name.lower()}" for name in (*TOKEN_MEMBERS, *endings) if "." in name)
    found: dict[str, Group] = {}
    parts = [_split(file.name, two_part) for file in files]
    known = {key for key, ending in parts if key and _known(ending)}
    anchors = {file.name[:-5] for file in files if file.name.lower().endswith(".json")} if documents else set()
    loose: list[str] = []
    for file, (key, ending) in zip(files, parts, strict=True):
        if _is_system(file.name) or not key:
            loose.append(NO_SAMPLE if _is_system(file.name) else ending)
            continue
        if documents and member_type(ending) in IMAGE_TYPES:
            head, _, number = key.rpartition(".")  # pictures of a document without its json: key.0, key.1, ...
            key = _longest(file.name, anchors) or (head if head and number.isdigit() else key)
            ending = file.name[len(key) + 1 :]
        elif not _known(ending):
            key = _longest(file.name, known) or key
        sample = found.setdefault(key, Group(key))
        if _known(ending):
            sample.members.append((ending.lower(), file))
        else:
            sample.ignored.append(member_type(ending))
    return list(found.values()), loose


class _Bounded(io.RawIOBase):
    """A stream that is never asked for more than it has: a damaged header can claim any size, and memory goes first."""

    def __init__(self, stream: IO[bytes], size: int) -> None:
        self._stream, self._size = stream, size

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._size - self._stream.tell())
        return self._stream.read(left if size < 0 else min(size, left))

    def seek(self, place: int, whence: int = 0) -> int:
        return self._stream.seek(place, whence)

    def tell(self) -> int:
        return self._stream.tell()


def _file(info: tarfile.TarInfo, links: list[tuple[File, str]]) -> File:
    file = File(_readable(info.name), info.offset_data, info.size)
    if info.islnk() or info.issym():
        target = info.linkname if info.islnk() else posixpath.join(posixpath.dirname(info.name), info.linkname)
        file.size, file.problem = 0, f"is a link to {_readable(info.linkname)!r}, which the shard does not hold"
        links.append((file, posixpath.normpath(_readable(target))))
    elif not info.isreg():
        file.size, file.problem = 0, "is a device or a pipe, not a file"
    elif info.size > MOST_BYTES:
        file.problem = f"has {info.size} bytes, more than {MOST_BYTES}"
    if info.issparse():
        file.sparse, file.size = info, 0
    return file


def _follow(links: list[tuple[File, str]], held: dict[str, File]) -> None:
    """Give links the bytes of what they lead to, over other links too."""
    while True:
        found = [(link, held[target]) for link, target in links if target in held]
        links = [(link, target) for link, target in links if target not in held]
        for link, file in found:
            link.place, link.size, link.sparse, link.problem = file.place, file.size, file.sparse, ""
        for link, _ in found:
            held.setdefault(posixpath.normpath(link.name), link)
        if not found:
            return


def _ending(stream: IO[bytes], place: int, size: int) -> str:
    """What is wrong with the end of a tar whose last header is behind us; tarfile is silent about it."""
    stream.seek(place)
    block = stream.read(_BLOCK)
    if len(block) < _BLOCK:
        return "the file ends without an end-of-archive mark"
    if any(block):
        return "damaged header"
    while rest := stream.read(1 << 20):
        if any(rest):
            return "data after the end-of-archive mark"
    return ""


def _split(name: str, two_part: tuple[str, ...]) -> tuple[str, str]:
    """(key, ending) of a file; the key is empty for a file that belongs to no sample."""
    folder, base = posixpath.split(name)
    head, _, ending = base.rpartition(".")
    for longer in two_part:
        if base.lower().endswith(longer) and len(base) > len(longer):
            head, ending = base[: -len(longer)], base[-len(longer) + 1 :]
            break
    if not head:
        return "", ending if "." in base else ""
    return (f"{folder.rstrip('/')}/{head}" if folder else head), ending


def _known(ending: str) -> bool:
    return member_type(ending) in ALLOWED_TYPES


def _is_system(name: str) -> bool:
    """What macOS and webdataset put beside samples."""
    parts = name.split("/")
    return (
        parts[-1].startswith("._")
        or parts[-1] == ".DS_Store"
        or "__MACOSX" in parts[:-1]
        or (parts[0].startswith("__") and parts[0].endswith("__") and len(parts[0]) > 4)
    )


def _longest(name: str, keys: set[str]) -> str:
    """The longest of `keys` that `name` continues after a dot, or ""."""
    while "." in name.rsplit("/", 1)[-1]:
        name = name.rsplit(".", 1)[0]
        if name in keys:
            return name
    return ""


def _readable(name: str) -> str:
    """A name as text without a leading "./"."""
    text = printable(name)
    while text.startswith("./"):
        text = text[2:]
    return text
