"""One sentence for what a person can mend; a traceback, and the wish to hear of it, for what is our own mistake.

`reading` and `writing` go around calls of a library that touch a file, `exit_status` around a whole command.
"""

from __future__ import annotations

import errno
import inspect
import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

FAILED, OUR_FAULT = 1, 70
"""Exit status after a sentence, and after a traceback of ours (EX_SOFTWARE)."""
_REPORT = "This is a fault of unidiff. Please report it with the lines above."

_SYSTEM = {
    errno.ENOSPC: "the disk is full; free some space, or name another place",
    errno.EDQUOT: "the disk quota is used up; free some space, or name another place",
    errno.EFBIG: "the file would be larger than the system allows; name another place or raise the limit",
    errno.EACCES: "permission denied; change the permissions, or name another place",
    errno.EPERM: "the system does not permit it; name another place",
    errno.EROFS: "the disk is read-only; name another place",
    errno.ENOENT: "no such file or folder",
    errno.ENOTDIR: "a part of the path is a file, not a folder",
    errno.EISDIR: "it is a folder, not a file",
    errno.EEXIST: "something of that name is in the way; remove it, or name another place",
    errno.ENOTEMPTY: "something else was written there meanwhile; look at it, then run again",
    errno.EBUSY: "the system is using it, as a mounted disk for instance; name a folder inside of it",
    errno.ENAMETOOLONG: "the name is too long",
    errno.ELOOP: "the links go round in circles",
    errno.EMFILE: "too many files are open; raise the limit with `ulimit -n`",
    errno.EIO: "the disk reports an error",
}
_LARGEST_JSON = 2**28  # bytes
_NO_MEMORY = ("not enough memory", "can't allocate memory", "out of memory", "invalid buffer size", "bad allocation")


class DamagedFile(ValueError):
    """A file that cannot be read as what it should be; the message is a whole sentence."""


@contextmanager
def reading(path: str | Path, what: str, fix: str = "the file is damaged or of another kind") -> Iterator[None]:
    """Around a library's reading of `path`: whatever it raises becomes one sentence that names the file.

    Keep the block to the library's call. Sentences of this package pass unchanged.

    Args:
        path: file, folder or address; for the message. what: what it should be, for instance "a config".
        fix: what may be wrong, or what to do.

    Raises:
        DamagedFile: anything that a library raises. OSError: of the system, with the file's name.
    """
    try:
        yield
    except (DamagedFile, MemoryError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # a panic of a Rust library is no Exception
        if isinstance(error, OSError) and error.errno is not None:  # Pillow and others use OSError for damage
            raise _with_name(error, path) from error
        if is_out_of_memory(error):
            raise
        raise DamagedFile(f"{str(path)!r} cannot be read as {what} ({reason_of(error)}); {fix}") from error


def reason_of(error: BaseException) -> str:
    """Why a library could not read a file, without the words of its own code."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, TypeError | AttributeError | LookupError | AssertionError | NotImplementedError | NameError):
        return "a value in it is missing or of the wrong kind"
    return first_line(error)


@contextmanager
def writing(path: str | Path, through: Path | None = None) -> Iterator[None]:
    """Around writing `path`: an `OSError` names it, whatever library was at work, and not the temporary file `through`."""
    try:
        yield
    except OSError as error:
        if through is not None and isinstance(error.filename, str) and error.filename.startswith(str(through)):
            raise type(error)(error.errno, error.strerror, str(path)) from error
        raise _with_name(error, path) from error
    except Exception as error:  # safetensors and torch wrap the system's words in errors of their own
        text = str(error)
        for number in (errno.ENOSPC, errno.EFBIG, errno.EROFS, errno.EDQUOT, errno.EACCES, errno.EIO):
            if os.strerror(number) in text or f"os error {number}" in text:
                raise OSError(number, os.strerror(number), str(path)) from error
        raise


def read_json(path: str | Path, what: str = "JSON", expect: type | tuple[type, ...] = dict) -> Any:
    """The content of a JSON file (UTF-8, with or without a byte order mark), whose outermost value is an `expect`.

    Raises:
        FileNotFoundError: no such file. DamagedFile: not JSON, or another outermost value.
    """
    check_regular(path)
    if (size := Path(path).stat().st_size) > _LARGEST_JSON:
        raise DamagedFile(f"{str(path)!r} has {size} bytes, too many for {what}; it is damaged or of another kind")
    with reading(path, what):
        value = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    if not isinstance(value, expect):
        kinds = expect if isinstance(expect, tuple) else (expect,)
        names = " or ".join(JSON_NAMES.get(kind, kind.__name__) for kind in kinds)
        raise DamagedFile(f"{str(path)!r} holds {json_name(value)} where {names} is expected; it is not {what}")
    return value


def import_extra(module: str, absent: str) -> Any:
    """A module that an extra of unidiff brings. Raises ValueError, with `absent` as its sentence, where it is not installed."""
    try:
        return import_module(module)
    except ImportError as error:
        raise ValueError(absent) from error


def warn(words: str, kind: type[Warning]) -> None:
    """A warning at the line outside of this package that led to it."""
    level, frame = 2, inspect.currentframe()
    frame = frame and frame.f_back
    while frame and frame.f_globals.get("__name__", "").partition(".")[0] in ("unidiff", "torch"):
        level, frame = level + 1, frame.f_back
    warnings.warn(words, kind, stacklevel=level)


def plain(name: object, most: int = 100) -> str:
    """A name from a file for a message: on one line, and not as long as a file can make it."""
    text = str(name)
    return _cut(text if text.isprintable() else repr(text), most)


def few(names: Iterable[str], most: int = 3) -> str:
    """The first of some names, for a message."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def check_regular(path: str | Path) -> None:
    """Raise `FileNotFoundError` or `DamagedFile` unless `path` is a plain file: reading a pipe could wait for ever."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "a pipe or a device"
        raise DamagedFile(f"{str(path)!r} is {kind} where a file is expected; put the file in its place")


JSON_NAMES = {
    dict: "a mapping",
    list: "a list",
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
}


def json_name(value: object) -> str:
    """What a person calls a plain value's type."""
    return "null" if value is None else JSON_NAMES.get(type(value), type(value).__name__)


def explain(error: BaseException) -> str | None:
    """The sentence for an error that a person can mend, or None for a mistake of ours.

    The text of a `ValueError` is the sentence; errors of the system are put into words with the name of the file.
    """
    if is_out_of_memory(error):
        return f"there is not enough memory ({first_line(error)}); use a smaller batch, picture, model or dtype"
    if isinstance(error, OSError) and error.errno is not None:
        said = _SYSTEM.get(error.errno, (error.strerror or os.strerror(error.errno)).lower())
        names = [n for n in (error.filename, error.filename2) if isinstance(n, str | bytes | os.PathLike)]
        return f"{' -> '.join(repr(_cut(os.fsdecode(name), 200)) for name in names)}: {said}" if names else said
    if isinstance(error, ValueError | OSError):
        return str(error).strip() or type(error).__name__
    if isinstance(error, RuntimeError) and str(error).startswith("Symlink loop"):  # of Path.resolve before Python 3.13
        return f"{str(error).partition(' from ')[2]}: {_SYSTEM[errno.ELOOP]}"
    return None


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."


def exit_status(
    run: Callable[[], int | None], *expected: type[Exception], program: str = "error", failed: int = FAILED
) -> int:
    """What `run` returns (None counts as 0), `failed` after one line about what a person can mend, `OUR_FAULT` after the
    traceback of what is no fault of theirs. `expected`: further errors whose text is a sentence for a person."""
    try:
        return run() or 0
    except BrokenPipeError:  # the reader of a pipe has left: nobody to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        sentence = str(error) if isinstance(error, expected) else explain(error)
        if sentence is None:
            traceback.print_exc()
            print(_REPORT, file=sys.stderr)
            return OUR_FAULT
        print(f"{program}: {sentence}", file=sys.stderr)
        return failed


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on the host or on a device."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _NO_MEMORY)


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0].strip()[:300] if lines else type(error).__name__


def _with_name(error: OSError, path: str | Path) -> OSError:
    if error.errno is None or error.filename is not None:
        return error
    return type(error)(error.errno, error.strerror or os.strerror(error.errno), str(path))
