"""Files that a command will write, checked before any work: fitting endings, places that can be written, nothing written over."""

from __future__ import annotations

import os
import socket
import stat
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from unidiff.files import resolve_link

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
_ENDINGS = {"--out": PICTURES, "--filmstrip": PICTURES, "--gif": (".gif",), "--json": (".json",)}
_LONGEST_NAME = 255  # bytes, of nearly all file systems


def check_outputs(
    out: Path | None = None,
    filmstrip: Path | None = None,
    gif: Path | None = None,
    json_file: Path | None = None,
    count: int = 1,
    inputs: Iterable[Path | None] = (),
) -> None:
    """Everything that a command will write, before it does any work.

    Args:
        count: pictures that `out` stands for; see `numbered`.
        inputs: files that the command reads.

    Raises:
        ValueError: another ending, no ordinary file, a place that cannot be written, two outputs in one file, or an
            output in place of an input. OSError: a name that is too long, links that go round in circles.
    """
    asked = {"--out": out, "--filmstrip": filmstrip, "--gif": gif, "--json": json_file}
    wanted: list[tuple[str, Path]] = []
    for flag, path in asked.items():
        if path is None:
            continue
        if path.suffix.lower() not in _ENDINGS[flag]:
            raise ValueError(f"output {str(path)!r} ({flag}) must end in {' or '.join(_ENDINGS[flag])}")
        wanted += [(flag, each) for each in (numbered(path, count) if flag == "--out" else [path])]
    check_files(wanted, inputs)


def check_folder(out: Path, names: Sequence[str], inputs: Iterable[Path | None] = ()) -> None:
    """A folder that a command will write files into; as `check_outputs`.

    Args:
        names: the files.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"output {str(out)!r} is a file; name a folder")
    check_files([("--out", out / name) for name in names], inputs)


def check_files(wanted: Sequence[tuple[str, Path]], inputs: Iterable[Path | None] = ()) -> None:
    """Files that a command will write, each with the option that names it; as `check_outputs`."""
    read = {mark: path for path in inputs if path is not None for mark in _marks(path)}
    written: dict[object, tuple[str, Path]] = {}
    for flag, path in wanted:
        _check_place(path, flag)
        for mark in _marks(path):
            if mark in read:
                raise ValueError(
                    f"output {str(path)!r} ({flag}) would overwrite the input {str(read[mark])!r}; name another file"
                )
        for mark in (*_marks(path), _folded(path)):
            other = written.setdefault(mark, (flag, path))
            if other != (flag, path):
                raise ValueError(
                    f"{other[0]} {str(other[1])!r} and {flag} {str(path)!r} are the same file; name another for one of them"
                )


def numbered(path: Path, count: int) -> list[Path]:
    """`path` for one picture; several get `-1`, `-2`, ... before the ending."""
    if count == 1:
        return [path]
    width = len(str(count))
    return [path.with_name(f"{path.stem}-{i + 1:0{width}d}{path.suffix}") for i in range(count)]


def _check_place(path: Path, flag: str) -> None:
    name = f"output {str(path)!r} ({flag})"
    if "\0" in str(path):
        raise ValueError(f"{name} holds a zero byte, which no file name has")
    if path.is_dir():
        raise ValueError(f"{name} is a folder; name a file")
    target = resolve_link(path)
    if target.exists():
        status = target.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{name} is no ordinary file; name another")
        if not status.st_mode & 0o222:
            raise ValueError(f"{name} is write-protected; name another, or change its permissions")
    aside = f".{target.name}.{socket.gethostname()}-{os.getpid()}.tmp"  # as `replacing` writes it first
    if len(os.fsencode(aside)) > _LONGEST_NAME:
        raise ValueError(f"output {str(path)[:60]!r}... ({flag}) has too long a name; shorten it")
    folder = next(parent for parent in target.absolute().parents if parent.exists() or parent.is_symlink())
    if not folder.is_dir():
        raise ValueError(f"{name} lies under {str(folder)!r}, which is a file")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"{name} cannot be written: {str(folder)!r} is read-only or belongs to somebody else")


def _marks(path: Path) -> Iterator[object]:
    """What tells whether two paths are one file: where links lead, and the file's number, for hard links."""
    yield os.path.realpath(path)
    if path.exists():
        status = path.stat()
        yield status.st_dev, status.st_ino


def _folded(path: Path) -> str:
    """The path as file systems see it that do not tell capitals from small letters."""
    return unicodedata.normalize("NFC", os.path.realpath(path)).casefold()
