"""The door of the server: addresses, sizes, and names of files in requests."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from studio_cases import HOSTILE, png

from unidiff.studio.guard import MOST_JSON, Guard
from unidiff.studio.uploads import MAX_BYTES


class Server:
    """What stands behind the door: answers 200 and notes what it was sent."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        message = await receive()
        self.bodies.append(message.get("body", b""))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"served"})


def ask(
    folder, method: str, path: str, body: bytes = b"", kind: str = "application/json", parts: int = 1
) -> tuple[int, str, Server]:
    server, sent = Server(), list[dict[str, Any]]()
    size = max(1, -(-len(body) // parts))
    chunks = [body[i : i + size] for i in range(0, len(body), size)] or [b""]
    waiting = [{"type": "http.request", "body": c, "more_body": c is not chunks[-1]} for c in chunks]

    async def receive() -> dict[str, Any]:
        return waiting.pop(0) if waiting else {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "headers": [(b"content-type", kind.encode())],
        "query_string": b"",
    }
    asyncio.run(Guard(server, str(folder))(scope, receive, send))
    return sent[0]["status"], sent[1]["body"].decode(), server


@pytest.mark.parametrize("path", ["/", "/config", "/theme.css", "/assets/index.js", "/gradio_api/heartbeat/ab12"])
def test_what_the_page_needs_is_served(path, tmp_path):
    assert ask(tmp_path, "GET", path)[0] == 200


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/proxy=http://127.0.0.1/", "/gradio_api/stream/a/b/1/playlist.m3u8", "/gradio_api/deep_link", "/login",
        "/gradio_api/custom_component/1/server/component/x", "/gradio_api/call/predict", "/gradio_api/api/predict", "/docs",
        "/monitoring/x", "/gradio_api/mcp/sse", "/openapi.json", "/gradio_api/openapi.json", "/gradio_api/run/other", "/file=/etc/passwd",
    ],
)  # fmt: skip
def test_nothing_else_is(path, tmp_path):
    for method in ("GET", "POST"):
        status, words, server = ask(tmp_path, method, path)
        assert status == 404 and "\n" not in words and not server.bodies
    assert ask(tmp_path, "DELETE", "/config")[0] == 404


def test_files_are_served_from_the_folder_of_the_server_only(tmp_path):
    inside = tmp_path / "sent"
    inside.mkdir()
    (inside / "own.png").write_bytes(png())
    (tmp_path / "secret").write_bytes(b"secret")
    (inside / "link.png").symlink_to(tmp_path / "secret")
    assert ask(inside, "GET", f"/gradio_api/file={inside}/own.png")[0] == 200
    for name in (
        "/etc/passwd", f"{inside}/../secret", f"{inside}/link.png", f"{inside}/%2e%2e/secret", str(inside), "own.png",
        "http://169.254.169.254/latest", "file:///etc/passwd", "\0", "x" * 5000, "../../etc/passwd",
    ):  # fmt: skip
        assert ask(inside, "GET", f"/gradio_api/file={name}")[0] == 403, name


def test_no_request_names_a_file_of_its_own(tmp_path):
    own = {"path": f"{tmp_path}/own.png", "meta": {"_type": "gradio.FileData"}}
    assert (
        ask(tmp_path, "POST", "/gradio_api/queue/join", json.dumps({"data": [own, None, "words"]}).encode())[0] == 200
    )
    for path in (
        "/etc/passwd",
        "http://127.0.0.1:9/x",
        f"{tmp_path}/../x",
        5,
        ["/etc/passwd"],
        {"path": "/etc/passwd"},
    ):
        for body in ({"data": [{"path": path}]}, {"data": [[{"a": [{"path": path, "url": "x"}]}]]}):
            status, words, server = ask(tmp_path, "POST", "/gradio_api/queue/join", json.dumps(body).encode())
            assert status == 400 and "was not sent to this server" in words and not server.bodies
    assert ask(tmp_path, "POST", "/gradio_api/run/predict", b"{")[0] == 400
    assert ask(tmp_path, "POST", "/gradio_api/run/predict", b"[" * 100_000)[0] == 400


def test_requests_are_bounded(tmp_path):
    status, words, _ = ask(tmp_path, "POST", "/gradio_api/queue/join", b" " * (MOST_JSON + 1), parts=9)
    assert status == 413 and words == "the request is too large"
    status, words, server = ask(
        tmp_path, "POST", "/gradio_api/upload", b"\0" * (MAX_BYTES + 10**5), "multipart/form-data; boundary=x", 40
    )
    assert status == 413 and "larger than 8 MB" in words and not server.bodies


def form(data: bytes, name: str) -> bytes:
    head = f'--x\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\nContent-Type: image/png\r\n\r\n'
    return head.encode() + data + b"\r\n--x--\r\n"


@pytest.mark.parametrize("name", [name for name in HOSTILE if name != "large.png"])
def test_hostile_uploads_are_refused_at_the_door(name, tmp_path):
    pytest.importorskip("starlette")
    pytest.importorskip("python_multipart")
    make, expected = HOSTILE[name]
    status, words, server = ask(
        tmp_path, "POST", "/gradio_api/upload", form(make(), name), "multipart/form-data; boundary=x"
    )
    assert status == 415 and expected in words and "\n" not in words and not server.bodies


def test_a_picture_passes_unchanged(tmp_path):
    pytest.importorskip("starlette")
    pytest.importorskip("python_multipart")
    body = form(png(), "../../evil.png")
    status, _, server = ask(tmp_path, "POST", "/gradio_api/upload", body, "multipart/form-data; boundary=x", 3)
    assert status == 200 and server.bodies == [body]
