"""Files and folders that appear complete or not at all: write under a temporary name, then rename."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to; renamed to `path` when the block ends well, else removed.

    Missing parent folders are made. The data reaches the disk before the name does. What a killed process left behind
    is removed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        flush_to_disk(temporary)
        os.replace(temporary, path)
        for stray in path.parent.glob(f".{path.name}.*.tmp"):
            if stray != temporary and not _is_running(stray):
                stray.unlink(missing_ok=True)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replacing_folder(target: str | Path) -> Iterator[Path]:
    """An empty folder beside `target` to fill; it takes the place of `target` when the block ends well, else it goes.

    Between the two renames the old folder is kept aside. What a killed process left behind is removed.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary, aside = (target.with_name(f".{target.name}.{os.getpid()}.{end}") for end in ("tmp", "old"))
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        if target.exists():
            os.replace(target, aside)
        os.replace(temporary, target)
        for end in ("tmp", "old"):
            for stray in target.parent.glob(f".{target.name}.*.{end}"):
                shutil.rmtree(stray, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(aside, ignore_errors=True)


def _is_running(temporary: Path) -> bool:
    """Whether the process that a temporary name mentions may still write to it."""
    number = temporary.suffixes[-2].removeprefix(".") if len(temporary.suffixes) > 1 else ""
    if os.name != "posix" or not number.isdecimal():
        return True
    try:
        os.kill(int(number), 0)  # signal 0 only asks
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def flush_to_disk(path: Path) -> None:
    """Wait until a file's or a folder's entry is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
