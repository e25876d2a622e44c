"""Where files are: paths, file URLs, http(s) addresses and stores (s3://, gs://, hf://, ... through fsspec, which also finds the
credentials). The one place that opens connections; it never starts a program."""

from __future__ import annotations

import http.client
import io
import os
import re
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NamedTuple
from urllib.error import HTTPError, URLError
from urllib.parse import unquote, urlsplit
from urllib.request import HTTPErrorProcessor

from unidiff.errors import DamagedFile, writing

TIMEOUT = 20.0
"""Seconds without a byte after which a server counts as silent."""
PAUSES = (1.0, 3.0)
"""Seconds before a download is tried again, where the fault may pass."""
STORES = ("s3", "gs", "gcs", "az", "abfs", "hf", "oci", "oss", "memory")
"""Schemes that fsspec reads and writes here. It knows others, some of which run programs."""
_PACKAGES = {
    "s3": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
    "oci": "ocifs",
    "oss": "ossfs",
}
_RANGE = 2**24  # bytes of a store that are asked for at a time
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
    """Whether `where` is an http(s) address or in a store."""
    return scheme(where) in ("http", "https", *STORES)


def in_store(where: str | os.PathLike[str]) -> bool:
    """Whether `where` is the address of a file or folder of `STORES`."""
    return scheme(os.fspath(where)) in STORES


def open_store(url: str) -> tuple[Any, str]:
    """fsspec's file system of an address, and the path in it. Raises `Unreachable` where it cannot be used here."""
    import fsspec

    kind = scheme(url)
    try:
        return fsspec.core.url_to_fs(url)  # type: ignore[no-any-return]
    except ImportError as error:
        package = _PACKAGES.get(kind, "its package for fsspec")
        raise Unreachable(f"{url!r} needs {package}; run pip install {package}") from error
    except Exception as error:  # of credentials and settings, each store its own
        raise Unreachable(f"{url!r} cannot be used ({_cause(error)})") from error


def listed(url: str) -> list[str] | None:
    """The files of a folder in a store, or those that a pattern with `*` finds, as addresses; None for what is no folder."""
    system, path = open_store(url)
    prefix = url[: url.index("://") + 3]
    try:
        if any(sign in path for sign in "*?["):
            found = system.glob(path)
        elif system.isdir(path):
            found = [entry["name"] for entry in system.ls(path, detail=True) if entry["type"] == "file"]
        else:
            return None
    except Exception as error:
        raise Unreachable(f"{url!r} cannot be listed ({_cause(error)})") from error
    return sorted(prefix + str(name).lstrip("/") for name in found)


def local_path(where: str) -> str:
    """The path of a file URL; a path as it is. Raises `DamagedFile`: a file URL of another machine."""
    if scheme(where) != "file":
        return where
    parts = urlsplit(where)
    if parts.netloc not in ("", "localhost"):
        raise DamagedFile(f"{where!r} names another machine; write file:///folder/file")
    return str(Path(unquote(parts.path)))


class _Limits(NamedTuple):
    """Of a download: bytes, when it has to be over, and who is told how far it is."""

    most: int | None
    end: float | None
    told: Callable[[int], object]


def fetch(url: str, most: int, seconds: float = 60.0) -> bytes:
    """The content of an http(s) address: at most `most` bytes within `seconds`; else raises `Unreachable`."""
    buffer = io.BytesIO()
    download(url, buffer, most, seconds)
    return buffer.getvalue()


def download(
    url: str,
    out: IO[bytes],
    most: int | None = None,
    seconds: float | None = None,
    told: Callable[[int], object] = lambda size: None,
) -> None:
    """Write the content of an address into an empty file; redirections stay with http and https.

    A fault that may pass (a silent or overloaded server, a connection that breaks) is tried again, from where it broke where
    the server gives a part of a file. Stores are read piece by piece.

    Args:
        most: bytes; None has no bound. seconds: for all of it; None has no bound but the server's silence.
        told: called with how many bytes are there, after every piece.

    Raises:
        Unreachable: no answer, a refusal, an answer that is cut, too long or too slow; its beginning is in `out`.
    """
    end = None if seconds is None else time.monotonic() + seconds
    out.seek(0)
    out.truncate()
    for pause in (*PAUSES, None):
        try:
            (_copy_from_store if in_store(url) else _copy)(url, out, _Limits(most, end, told))
            return
        except Exception as error:  # of the address, the network, the server or the library
            failure = error
        if isinstance(failure, Unreachable):
            raise failure
        local = isinstance(failure, OSError) and not isinstance(failure, URLError | FileNotFoundError)
        if local and getattr(failure, "filename", None) is not None:
            raise failure  # the file that is written, not the network
        if pause is None or not _may_pass(failure) or (end is not None and time.monotonic() + pause > end):
            gone = isinstance(failure, FileNotFoundError) or getattr(failure, "code", None) in _GONE
            raise Unreachable(f"{url!r} cannot be downloaded ({_cause(failure)})", gone) from failure
        time.sleep(pause)


def remote_stamp(url: str) -> dict[str, Any]:
    """What a server or store says about a file without sending it: size, time of change and tag, as far as it says them."""
    if in_store(url):
        return _store_stamp(url)
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


def _copy(url: str, out: IO[bytes], limits: _Limits) -> None:
    size = out.tell()
    with _open(url, "GET", size) as answer:
        if answer.status != 206:  # all of it, whatever was asked for
            out.seek(0)
            out.truncate()
            size = 0
        while piece := answer.read1(_PIECE):
            size = _put(url, out, piece, size, limits)
        expected, begun = answer.headers.get("Content-Length", ""), answer.headers.get("Content-Range", "")
    whole = begun.rpartition("/")[2] if answer.status == 206 else expected
    if whole.isdigit() and size < int(whole):
        raise ConnectionError(f"the server sent {size} of {whole} bytes")


def _copy_from_store(url: str, out: IO[bytes], limits: _Limits) -> None:
    system, path = open_store(url)
    whole, size = int(system.info(path)["size"]), out.tell()
    while size < whole:
        piece = system.cat_file(path, start=size, end=min(size + _RANGE, whole))
        if not piece:
            raise ConnectionError(f"the store gave {size} of {whole} bytes")
        size = _put(url, out, piece, size, limits)


def _put(url: str, out: IO[bytes], piece: bytes, size: int, limits: _Limits) -> int:
    """Write a piece behind `size` bytes; how many there are then."""
    with writing("the temporary file of a download"):
        out.write(piece)
    size += len(piece)
    if limits.most is not None and size > limits.most:
        raise Unreachable(f"{url!r} is larger than {limits.most / 2**20:.3g} MB; no such file is expected")
    if limits.end is not None and time.monotonic() > limits.end:
        raise Unreachable(f"{url!r} cannot be downloaded (it takes too long)")
    limits.told(size)
    return size


def _store_stamp(url: str) -> dict[str, Any]:
    system, path = open_store(url)
    try:
        found = system.info(path)
    except Exception as error:
        raise Unreachable(
            f"{url!r} cannot be asked for ({_cause(error)})", isinstance(error, FileNotFoundError)
        ) from error
    tags = {"size": ("size",), "hash": ("ETag", "etag", "md5Hash", "content_md5"), "time": ("LastModified", "updated")}
    named = {name: next((found[key] for key in keys if found.get(key)), None) for name, keys in tags.items()}
    return {name: value if name == "size" else str(value) for name, value in named.items() if value is not None}


def _open(url: str, method: str, start: int = 0) -> Any:
    """The server's answer, from byte `start` on where it can, without the handlers of ftp, file and data, which redirections could lead to."""
    opener = urllib.request.OpenerDirector()
    kinds = ("Proxy", "HTTP", "HTTPS", "HTTPRedirect", "HTTPDefaultError", "Unknown")
    for handler in [getattr(urllib.request, f"{kind}Handler")() for kind in kinds] + [HTTPErrorProcessor()]:
        opener.add_handler(handler)
    headers = {"User-Agent": "unidiff"} | ({"Range": f"bytes={start}-"} if start else {})
    request = urllib.request.Request(url, headers=headers, method=method)
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
