"""Where files are: paths, file URLs and http(s) addresses. The one place that opens connections; it never starts a program."""

from __future__ import annotations

import http.client
import io
import os
import re
import time
import urllib.request
from pathlib import Path
from typing import IO, Any
from urllib.error import HTTPError, URLError
from urllib.parse import unquote, urlsplit
from urllib.request import HTTPErrorProcessor

from unidiff.errors import DamagedFile, writing

TIMEOUT = 20.0
"""Seconds without a byte after which a server counts as silent."""
PAUSES = (1.0, 3.0)
"""Seconds before a download is tried again, where the fault may pass."""
_GONE = (403, 404, 410)  # some stores say 403 for what they do not have
_PASSING = (408, 425, 429, 500, 502, 503, 504)
_PIECE = 2**20


class Unreachable(DamagedFile):
    """An address that cannot be read. `gone`: the server says that it has no such file."""

    def __init__(self, message: str, gone: bool = False) -> None:
        super().__init__(message)
        self.gone = gone


def scheme(where: str) -> str:
    """Lower-case scheme of an address, "" for a path (a file with a colon in its name is a path)."""
    found = re.match(r"\s*([A-Za-z][A-Za-z0-9+.-]*):", where)
    return "" if found is None or os.path.lexists(where) else found[1].lower()


def is_remote(where: str) -> bool:
    """Whether `where` is an http(s) address."""
    return scheme(where) in ("http", "https")


def local_path(where: str) -> str:
    """The path of a file URL; a path as it is. Raises `DamagedFile`: a file URL of another machine."""
    if scheme(where) != "file":
        return where
    parts = urlsplit(where)
    if parts.netloc not in ("", "localhost"):
        raise DamagedFile(f"{where!r} names another machine; write file:///folder/file")
    return str(Path(unquote(parts.path)))


def fetch(url: str, most: int, seconds: float = 60.0) -> bytes:
    """The content of an http(s) address: at most `most` bytes within `seconds`; else raises `Unreachable`."""
    buffer = io.BytesIO()
    download(url, buffer, most, seconds)
    return buffer.getvalue()


def download(url: str, out: IO[bytes], most: int | None = None, seconds: float | None = None) -> None:
    """Write the content of an http(s) address into an empty file; redirections stay with http and https.

    A fault that may pass (a silent or overloaded server, a connection that breaks) is tried again, from the start.

    Args:
        most: bytes; None has no bound. seconds: for all of it; None has no bound but the server's silence.

    Raises:
        Unreachable: no answer, a refusal, an answer that is cut, too long or too slow; its beginning is in `out`.
    """
    end = None if seconds is None else time.monotonic() + seconds
    for pause in (*PAUSES, None):
        out.seek(0)
        out.truncate()
        try:
            _copy(url, out, most, end)
            return
        except Exception as error:  # of the address, the network, the server or the library
            failure = error
        if isinstance(failure, Unreachable):
            raise failure
        if isinstance(failure, OSError) and not isinstance(failure, URLError) and failure.filename is not None:
            raise failure  # the file that is written, not the network
        if pause is None or not _may_pass(failure) or (end is not None and time.monotonic() + pause > end):
            gone = isinstance(failure, HTTPError) and failure.code in _GONE
            raise Unreachable(f"{url!r} cannot be downloaded ({_cause(failure)})", gone) from failure
        time.sleep(pause)


def remote_stamp(url: str) -> dict[str, Any]:
    """What a server says about a file without sending it: size, time of change and tag, as far as it says them."""
    named = {"size": "Content-Length", "time": "Last-Modified", "hash": "ETag"}
    try:
        with _open(url, "HEAD") as answer:
            found = {name: answer.headers.get(header) for name, header in named.items()}
    except Exception as error:
        gone = isinstance(error, HTTPError) and error.code in (404, 410)
        raise Unreachable(f"{url!r} cannot be asked for ({_cause(error)})", gone) from error
    if found["size"] is not None and found["size"].isdigit():
        found["size"] = int(found["size"])
    return {name: value for name, value in found.items() if value is not None}


def _copy(url: str, out: IO[bytes], most: int | None, end: float | None) -> None:
    with _open(url, "GET") as answer:
        size = 0
        while piece := answer.read1(_PIECE):
            with writing("the temporary file of a download"):
                out.write(piece)
            size += len(piece)
            if most is not None and size > most:
                raise Unreachable(f"{url!r} is larger than {most / 2**20:.3g} MB; no such file is expected")
            if end is not None and time.monotonic() > end:
                raise Unreachable(f"{url!r} cannot be downloaded (it takes too long)")
        expected = answer.headers.get("Content-Length", "")
    if expected.isdigit() and size < int(expected):
        raise ConnectionError(f"the server sent {size} of {expected} bytes")


def _open(url: str, method: str) -> Any:
    """The server's answer, without the handlers of ftp, file and data, which redirections could lead to."""
    opener = urllib.request.OpenerDirector()
    kinds = ("Proxy", "HTTP", "HTTPS", "HTTPRedirect", "HTTPDefaultError", "Unknown")
    for handler in [getattr(urllib.request, f"{kind}Handler")() for kind in kinds] + [HTTPErrorProcessor()]:
        opener.add_handler(handler)
    request = urllib.request.Request(url, headers={"User-Agent": "unidiff"}, method=method)
    return opener.open(request, timeout=TIMEOUT)


def _may_pass(error: Exception) -> bool:
    if isinstance(error, HTTPError):
        return error.code in _PASSING
    cause = error.reason if isinstance(error, URLError) else error
    return isinstance(cause, TimeoutError | ConnectionError | http.client.HTTPException) and not isinstance(
        cause, ConnectionRefusedError | http.client.InvalidURL
    )


def _cause(error: Exception) -> str:
    return str(error.reason if type(error) is URLError else error) or type(error).__name__
