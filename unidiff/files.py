"""Files and folders that appear complete or not at all, that one process at a time writes, and that are known again later."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from unidiff.errors import writing

try:
    import fcntl
except ImportError:  # Windows has no advisory locks of this kind
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # what disks of a network may answer
_PART = "part"
_HOLDER = re.compile(rb"process \d+ on [^\n]* \([^\n]*\)\n")  # what a lock file says; after a kill it stays
_LONGEST_NAME = 255  # bytes, of nearly all file systems
_HASHED = 2**20  # bytes at either end of a file that its stamp looks at


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to; renamed to `path` when the block ends well, else removed.

    Missing parent folders are made. The data reaches the disk before the name does. What a killed process left behind
    is removed. A link is written through: the file that it points to is replaced.

    Raises:
        ValueError: `path` is a folder, a device or a pipe. OSError: of the disk, with the name of `path`.
    """
    path = resolve_link(path)
    temporary = beside(path, "tmp")
    with writing(path, temporary):
        _check_kind(path, f"output {str(path)!r}")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            _keep_mode(path, temporary)
            flush_to_disk(temporary)
            os.replace(temporary, path)
            remove_leftovers(path)
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


def replace_text(path: str | Path, text: str) -> None:
    """Write a whole text file (UTF-8) as `replacing` does."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, data: Any) -> None:
    """Write data for programs and people as `replacing` does."""
    replace_text(path, json.dumps(data, indent=1) + "\n")


@contextmanager
def replacing_folder(target: str | Path, flush: bool = True) -> Iterator[Path]:
    """An empty folder beside `target` to fill; it takes the place of `target` when the block ends well, else it goes.

    Everything that was in `target` is gone then: callers make sure that it may go. Between the two renames the old folder
    is kept aside, and comes back when the second one fails. The rest is as with `replacing`.

    Args:
        flush: wait until every file is on the disk; False for thousands of files that a command can make again.
    """
    target = resolve_link(target)
    aside = beside(target, "old")
    with _scratch_folder(target, target) as temporary:
        yield temporary
        for file in temporary.rglob("*") if flush else ():
            if file.is_file():
                flush_to_disk(file)
        _keep_mode(target, temporary)
        if target.exists():
            os.replace(target, aside)
        try:
            os.replace(temporary, target)
        finally:
            if aside.exists() and not target.exists():
                os.replace(aside, target)
            shutil.rmtree(aside, ignore_errors=True)
        remove_leftovers(target)


@contextmanager
def filling_folder(target: str | Path) -> Iterator[Path]:
    """An empty folder to write files to; they move into `target` when the block ends well, else they go.

    Files of the same names are replaced, everything else in `target` stays. Links are written through.
    """
    target = resolve_link(target)
    with _scratch_folder(target, target / _PART) as temporary:  # inside: a folder may be a disk of its own
        yield temporary
        for file in sorted(temporary.iterdir()):
            flush_to_disk(file)
            place = resolve_link(target / file.name)
            _keep_mode(place, file)
            shutil.move(file, place) if place.parent != target else os.replace(file, place)


@contextmanager
def _scratch_folder(target: Path, near: Path) -> Iterator[Path]:
    """An empty folder beside `near` that is gone after the block; errors name `target`."""
    temporary = beside(near, "tmp")
    with writing(target, temporary):
        near.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(near)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            yield temporary
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def check_writable(path: str | Path | None, flag: str = "") -> None:
    """Before any work: raise where a file cannot be written later; None is a file that nobody asked for.

    Args:
        flag: the option that names it, for the message.

    Raises:
        ValueError: a folder, a device, a pipe, a path below a file, or a place that may not be written.
        OSError: a name that is too long, links that go round in circles.
    """
    if path is None:
        return
    name = f"output {str(path)!r:.80}" + (f" ({flag})" if flag else "")
    if "\0" in str(path):
        raise ValueError(f"{name} holds a zero byte, which no file name has")
    target = resolve_link(path)
    with writing(target):
        _check_kind(target, name)
        if len(os.fsencode(beside(target, "tmp").name)) > _LONGEST_NAME:
            raise ValueError(f"{name} has too long a name; shorten it")
        parent = next(p for p in target.absolute().parents if p.exists() or p.is_symlink())
        if not parent.is_dir():
            raise ValueError(f"{name} lies under {str(parent)!r}, which is a file")
        if not os.access(parent, os.W_OK | os.X_OK):
            raise ValueError(f"{name} cannot be written: {str(parent)!r} is read-only or belongs to somebody else")


def _keep_mode(old: Path, new: Path) -> None:
    """Who may read and write it stays as it was."""
    with suppress(OSError):  # nothing there before, or a disk without permissions
        shutil.copymode(old, new)


def _check_kind(path: Path, name: str) -> None:
    if path.exists() and not path.is_file():  # a rename would put a file in the place of a device
        kind = "a folder; name a file" if path.is_dir() else "a device or a pipe, no ordinary file; name another"
        raise ValueError(f"{name} is {kind}")


def path_of(value: Any) -> Path:
    """What a caller gave as a path; `ValueError` for anything but text and paths."""
    if not isinstance(value, str | os.PathLike) or isinstance(os.fspath(value), bytes):
        raise ValueError(f"the path is {value!r:.80}; expected the name of a file or folder")
    return Path(value)


def resolve_link(path: str | os.PathLike[str]) -> Path:
    """Where writing to `path` really writes: the end of a chain of links, or `path` itself.

    Raises:
        OSError: links that go round in circles. ValueError: the root of a disk, or a home folder written as ~.
    """
    path = path_of(path)
    _check_no_home(path)
    if path.name in ("", ".."):  # such as "."
        path = path.resolve()
        if not path.name:
            raise ValueError(f"{str(path)!r} is the root of a disk; name something in it")
    if not path.is_symlink():
        return path
    with writing(path):
        resolved = Path(os.path.realpath(path))
        if resolved.is_symlink():  # gives up silently on a circle
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
        return resolved


def _check_no_home(path: Path) -> None:
    """Shells look ~ up, but not in `--out=~/x`: a folder of that name is nobody's wish."""
    if path.parts and path.parts[0].startswith("~") and (len(path.parts) > 1 or path.name == "~"):
        raise ValueError(f"{str(path)!r}: ~ is not looked up here; write the whole path (or ./~)")


def remove_leftovers(path: Path) -> None:
    """Remove what killed processes left of writing exactly `path`; a temporary of a live process stays.

    An old folder that was set aside comes back when its replacement never arrived.
    """
    pattern = re.compile(rf"\.{re.escape(path.name)}\.(?:(?P<host>[^.]*)-)?(?P<pid>\d+)\.(?P<end>tmp|old)")
    for stray in path.parent.iterdir():
        found = pattern.fullmatch(stray.name)
        if found is None or _may_be_alive(found["host"], int(found["pid"])):
            continue
        if found["end"] == "old" and not path.exists():
            os.replace(stray, path)
        elif stray.is_dir() and not stray.is_symlink():
            shutil.rmtree(stray, ignore_errors=True)
        else:
            stray.unlink(missing_ok=True)


@contextmanager
def locked(folder: str | Path, what: str = "run") -> Iterator[None]:
    """Keep other processes out of a folder, made when missing, while the block runs; the lock goes with the process.

    Args:
        what: who works there, for the message ("training", "encoding").

    Raises:
        ValueError: another process holds it; the message names its number and machine.
    """
    path = Path(folder) / LOCK
    _check_no_home(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = _take(path, what)
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink(missing_ok=True)
        os.close(handle)


def _take(path: Path, what: str) -> int:
    """An open, locked lock file that is still the one of that name."""
    while True:
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise ValueError(f"{str(path)!r} is in the place of unidiff's lock; move it, or name another folder")
        handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
        try:
            if fcntl is not None:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(handle, 500).decode("utf-8", "replace").strip() or "another process"
            os.close(handle)
            raise ValueError(
                f"{str(path.parent)!r} is in use by {holder}; wait for it, or name another output folder for this {what}"
            ) from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(handle)
                raise
            warnings.warn(
                f"the disk of {str(path.parent)!r} knows no locks; make sure yourself that no second {what} writes there",
                stacklevel=2,
            )
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                if (content := os.read(handle, 500)) and not _HOLDER.fullmatch(content):
                    os.close(handle)
                    raise ValueError(f"{str(path)!r} is no lock of unidiff's; move it, or name another folder")
                try:
                    os.truncate(handle, 0)
                    os.lseek(handle, 0, os.SEEK_SET)
                    os.write(handle, f"process {os.getpid()} on {socket.gethostname()} ({what})\n".encode())
                except OSError:  # a full disk
                    path.unlink(missing_ok=True)
                    os.close(handle)
                    raise
                return handle
        os.close(handle)  # its holder has just removed it


def file_stamp(path: str | Path) -> dict[str, int | str]:
    """What a file is known by later: size in bytes, time of change in nanoseconds, and a hash of its two ends.

    Two stamps differ when the file was replaced, completed or cut. A hash of a whole large shard would take minutes.
    """
    with open(path, "rb") as file:
        status = os.fstat(file.fileno())
        digest = hashlib.sha256(file.read(_HASHED))
        if status.st_size > _HASHED:
            file.seek(max(_HASHED, status.st_size - _HASHED))
            digest.update(file.read(_HASHED))
    return {"size": status.st_size, "time": status.st_mtime_ns, "hash": digest.hexdigest()[:32]}


def flush_to_disk(path: Path) -> None:
    """Wait until a file's or a folder's entry is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def beside(path: Path, end: str) -> Path:
    """A temporary name of this process beside `path`, which `remove_leftovers(path)` knows."""
    return path.with_name(f".{path.name}.{_host()}-{os.getpid()}.{end}")


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9_-]", "_", socket.gethostname())


def _may_be_alive(host: str | None, pid: int) -> bool:
    """Whether the process that a temporary name mentions may still write to it; on another machine nobody can tell."""
    if host not in (None, _host()) or os.name != "posix" or pid == os.getpid():
        return True
    try:
        os.kill(pid, 0)  # signal 0 only asks
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        pass
    return True
