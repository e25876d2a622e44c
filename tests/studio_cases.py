"""Files that a studio must not take, pictures that it takes, and a run of a form to its end."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator

from PIL import Image

from unidiff.studio.session import Form, Shown, Studio
from unidiff.studio.tasks import BY_NAME
from unidiff.studio.uploads import MAX_BYTES


def png(size: tuple[int, int] = (24, 16), colour: str = "red", mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    Image.new(mode, size, colour).save(file, "PNG")
    return file.getvalue()


def bomb(side: int = 60_000) -> bytes:
    """A PNG of a few kB that claims to be gigapixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    body = zlib.compress(b"\0" * 100_000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


HOSTILE = {
    "bomb.png": (bomb, "more than the 16000000 that are read"),
    "drawing.svg": (lambda: b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>', "SVG"),
    "renamed.png": (lambda: b"#!/bin/sh\necho hello\n", "it is of another kind"),
    "document.png": (lambda: b"%PDF-1.7 ...", "it is a PDF"),
    "large.png": (lambda: b"\x89PNG\r\n\x1a\n" + b"\0" * MAX_BYTES, "larger than 8 MB"),
    "cut.png": (lambda: png((300, 300), "blue")[:200], "cut or damaged"),
    "nothing.png": (lambda: b"", "it is empty"),
}


def events(studio: Studio, task: str, form: Form, name: str = "ann") -> list[Shown]:
    return list(studio.work(name, BY_NAME[task], form))


def shown(studio: Studio, task: str, form: Form, name: str = "ann") -> Iterator[Shown]:
    return studio.work(name, BY_NAME[task], form)
