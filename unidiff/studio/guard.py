"""The door of the web server: which addresses it answers, how much a request may send, and that no request names a file.

It stands before everything else of gradio (an ASGI middleware), since gradio serves more than the studio uses.
"""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable, MutableMapping
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from unidiff.studio.uploads import MAX_BYTES, sent_picture

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

MOST_JSON = 256 * 2**10
"""Bytes of a request that is no upload."""
_OPEN = re.compile(
    r"/(?:$|config/?$|theme\.css$|manifest\.json$|favicon\.ico$|robots\.txt$|assets/|static/|svelte/|"
    r"gradio_api/(?:info/?$|app_id/?$|startup-events/?$|heartbeat/[\w-]+$|queue/(?:join|data)/?$|cancel/?$|reset/?$|"
    r"upload/?$|upload_progress/?$|component_server/?$|run/predict/?$|file=))"
)
_LARGE = ("/gradio_api/upload", "/gradio_api/component_server")


class Guard:
    """Answers in place of the server what it must not see.

    Args:
        app: the server. folder: where it stores what is sent; `/gradio_api/file=` serves files from there only.
    """

    def __init__(self, app: Any, folder: str) -> None:
        self.app, self.folder = app, Path(folder).resolve()

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"]
        if not _OPEN.match(path) or scope["method"] not in ("GET", "HEAD", "POST"):
            return await _refuse(send, 404, "the studio has nothing there")
        if path.startswith("/gradio_api/file=") and not self._own(path.removeprefix("/gradio_api/file=")):
            return await _refuse(send, 403, "the studio serves no such file")
        if scope["method"] != "POST":
            return await self.app(scope, receive, send)
        large = path.rstrip("/") in _LARGE
        body = await _body(receive, MAX_BYTES + 16 * 2**10 if large else MOST_JSON)
        if body is None:
            words = f"the file is larger than {MAX_BYTES // 2**20} MB; make the picture smaller"
            return await _refuse(send, 413, words if large else "the request is too large")
        if path.rstrip("/") == "/gradio_api/upload":
            if fault := await _fault_of_upload(scope, body):
                return await _refuse(send, 415, fault)
        elif fault := "" if large and _is_form(scope) else self._fault_of_json(body):
            return await _refuse(send, 400, fault)
        await self.app(scope, _again(body, receive), send)

    def _own(self, name: str) -> bool:
        """Whether a path lies in the server's own folder, wherever links lead, decoded once more or not."""
        if "\0" in name:
            return False
        try:
            return all(self.folder in Path(each).resolve().parents for each in (name, unquote(name)))
        except (OSError, ValueError, RuntimeError):
            return False

    def _fault_of_json(self, body: bytes) -> str:
        """What is wrong with a request, "" for nothing: it names a file that was not sent to this server."""
        try:
            found = json.loads(body or b"null")
        except (ValueError, RecursionError):
            return "the request is no JSON"
        waiting = [found]
        while waiting:
            value = waiting.pop()
            if isinstance(value, dict):
                path = value.get("path")
                if path is not None and not (isinstance(path, str) and self._own(path)):
                    return "the request names a file that was not sent to this server"
                waiting += value.values()
            elif isinstance(value, list):
                waiting += value
        return ""


async def _body(receive: Receive, most: int) -> bytes | None:
    """What a request sends; None where it is more than `most` bytes, the rest of which is not read."""
    parts, size = list[bytes](), 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return b"".join(parts)
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > most:
            return None
        if not message.get("more_body", False):
            return b"".join(parts)


def _again(body: bytes, receive: Receive) -> Receive:
    """`receive` of a request whose body was read already."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


async def _fault_of_upload(scope: MutableMapping[str, Any], body: bytes) -> str:
    """What is wrong with a sent file, "" for nothing: it is no picture, or too large a one."""
    from anyio import to_thread
    from starlette.requests import Request

    async def nothing() -> Message:
        return {"type": "http.disconnect"}

    try:
        form = await Request(scope, _again(body, nothing)).form(max_files=MOST_FILES, max_fields=4)
    except Exception:  # whatever a parser makes of it
        return "the request holds no file"
    try:
        for _, sent in form.multi_items():
            data = sent.encode() if isinstance(sent, str) else await sent.read()
            try:
                await to_thread.run_sync(partial(sent_picture, data))
            except (ValueError, OSError, MemoryError) as error:
                return str(error) or "the picture is too large for the memory of the server"
    finally:
        await form.close()
    return ""


MOST_FILES = 16


def _is_form(scope: MutableMapping[str, Any]) -> bool:
    return any(name == b"content-type" and value.startswith(b"multipart/form-data") for name, value in scope["headers"])


async def _refuse(send: Send, status: int, words: str) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"x-content-type-options", b"nosniff")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": words.encode()})
