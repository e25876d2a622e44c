"""Folders of every kind that unidiff reads, ways to damage their files, and what reading a damaged one may do."""

from __future__ import annotations

import json
import math
import random
import re
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from unidiff.errors import explain

WRONG: tuple[Any, ...] = (None, True, -1, 0, 1.5, 1e30, 10**30, 10**12, "x", "", [], {}, [[]], math.nan)
"""What every value of every JSON file is replaced by."""
INTERNALS = re.compile(
    r"NoneType|unhashable|object is not|Traceback|not subscriptable|unexpected keyword|positional argument|has no attribute"
    r"|Errno|not iterable|must be str|operand type|list index|__"
)
SECONDS = 20
MEMORY = 4 * 2**30  # bytes of address space that a case may ask for besides what the process has
KEPT_ITEMS = 3  # of long lists and tables, from either end


class Hang(BaseException):
    """A case that does not end."""


@dataclass(frozen=True)
class Kind:
    """One kind of folder.

    Attributes:
        write: makes a good one. load: reads it and returns what it does, as plain data and tensors.
        texts: its JSON files. blobs: further files, for damage byte by byte.
    """

    name: str
    write: Callable[[Path], None]
    load: Callable[[Path], Any]
    texts: tuple[str, ...] = ()
    blobs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Case:
    """A damaged file: what was changed, its new content, and for JSON the old and the new value."""

    file: str
    label: str
    content: bytes
    old: Any = None
    new: Any = None
    typed: bool = False
    bits: bool = False  # nobody can know that another number was meant

    def same_kind(self) -> bool:
        """Whether the new value may be a sensible one: a number for a number, a text for a text, and so on."""
        if not self.typed:
            return False
        if isinstance(self.old, bool) or isinstance(self.new, bool):
            return isinstance(self.old, bool) and isinstance(self.new, bool)
        numbers = isinstance(self.old, int | float) and isinstance(self.new, int | float)
        if "extra_special_tokens = {}" in self.label:  # transformers takes a list or a mapping, and writes {} for none
            return True
        return numbers or (type(self.old) is type(self.new)) or self.new is None or self.old is None


def json_cases(folder: Path, file: str) -> Iterator[Case]:
    """Every value of a JSON file replaced by each of `WRONG`, and left out; then damage to the text as a whole."""
    path = folder / file
    content = json.loads(path.read_text(encoding="utf-8"))
    for where, old in values(content):
        name = "/".join(map(str, where)) or "(all)"
        for new in WRONG:
            if type(new) is type(old) and new == old:
                continue
            text = json.dumps(replaced(content, where, new))
            yield Case(file, f"{file}: {name} = {new!r}"[:120], text.encode(), old, new, True)
        if where and isinstance(where[-1], str):
            yield Case(
                file, f"{file}: without {name}", json.dumps(replaced(content, where, Hang)).encode(), old, None, True
            )
    strange = {
        "empty": b"",
        "deep": b"[" * 100_000,
        "deep mapping": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
        "quite deep": b'{"a":' * 800 + b"1" + b"}" * 800,
        "no UTF-8": path.read_bytes().replace(b'"', b'\xff"', 1),
        "UTF-16": path.read_text(encoding="utf-8").encode("utf-16"),
        "long number": b'{"a": ' + b"9" * 5000 + b"}",
        "two values": path.read_bytes() * 2,
        "NUL bytes": b"\0" * 300,
        "a surrogate": json.dumps(
            {**content, "\ud800": "\udfff"} if isinstance(content, dict) else ["\ud800"]
        ).encode(),
    }
    for label, damaged in strange.items():
        yield Case(file, f"{file}: {label}", damaged)


def values(content: Any, where: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """(path, value) of everything in JSON data; of long lists and tables only the ends."""
    yield where, content
    inner = (
        list(content.items())
        if isinstance(content, dict)
        else list(enumerate(content))
        if isinstance(content, list)
        else []
    )
    if len(inner) > 60:
        inner = inner[:KEPT_ITEMS] + inner[-KEPT_ITEMS:]
    for key, value in inner:
        yield from values(value, (*where, key))


def replaced(content: Any, where: tuple[Any, ...], new: Any) -> Any:
    """The data with another value at a path; `Hang` removes it."""
    if not where:
        return new
    copy = dict(content) if isinstance(content, dict) else list(content)
    if len(where) == 1 and new is Hang:
        del copy[where[0]]
    else:
        copy[where[0]] = replaced(content[where[0]], where[1:], new)
    return copy


def byte_cases(folder: Path, file: str, seed: int, count: int) -> Iterator[Case]:
    """A file cut at random places, with bits flipped near its start and end, garbage, emptiness, and the wrong kind."""
    whole, draw = (folder / file).read_bytes(), random.Random(f"{seed} {file}")
    for _ in range(count):
        cut = draw.randrange(len(whole))
        yield Case(file, f"{file}: cut at {cut}", whole[:cut])
        place = (
            draw.randrange(min(len(whole), 2000)) if draw.random() < 0.7 else -1 - draw.randrange(min(len(whole), 500))
        )
        flipped = bytearray(whole)
        flipped[place] ^= 1 << draw.randrange(8)
        yield Case(file, f"{file}: a bit flipped at {place}", bytes(flipped), bits=True)
    for label, content in (
        ("empty", b""),
        ("garbage", draw.randbytes(3000)),
        ("a web page", b"<!DOCTYPE html><html>Not found</html>"),
        ("a pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"),
        ("a huge header", b"\xff" * 7 + b"\x7f" + whole[8:]),
        ("with more behind it", whole + b"more"),
    ):
        yield Case(file, f"{file}: {label}", content)


def fault(kind: Kind, folder: Path, case: Case, good: Any) -> str | None:
    """What is wrong about the way in which a damaged folder is read; None where all is well.

    Either it loads and does what the good one does (what was changed is not used), or something that a value of the
    same kind may mean; or one sentence names a file or the folder.
    """
    path = folder / case.file
    before = path.read_bytes()
    path.write_bytes(case.content)
    try:
        with limits():
            found = kind.load(folder)
    except (ValueError, OSError) as error:
        return sentence_fault(error, folder)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        return f"{type(error).__name__}: {str(error)[:200]}"
    finally:
        path.write_bytes(before)
    if same(found, good) or case.same_kind() or case.bits:
        return None
    return "loads, and does something else"


def sentence_fault(error: Exception, folder: Path) -> str | None:
    """What is wrong about the text of an expected error."""
    text = explain(error) or ""
    if str(folder) not in text:
        return f"no file named: {type(error).__name__}: {text[:200]}"
    if "\n" in text or len(text) > 1500:
        return f"not one line: {text[:300]!r}"
    if found := INTERNALS.search(text.replace(str(folder), "")):
        return f"internals ({found[0]}): {text[:300]}"
    return None


def same(one: Any, other: Any) -> bool:
    """Whether two results are equal, tensors included."""
    if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
        return isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


@contextmanager
def limits() -> Iterator[None]:
    """An end to waiting and to memory."""

    def ring(*_: Any) -> None:
        raise Hang(f"more than {SECONDS} s")

    with open("/proc/self/statm") as status:
        used = int(status.read().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, ring)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, hard))
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
