"""Shards over HTTP from a server on this machine: whole, vanished, and cut in transit."""

import http.server
import socket
import threading
from pathlib import Path

import pytest
from shard_samples import write_samples

from unidiff import addresses
from unidiff.data import report
from unidiff.data.report import Skip
from unidiff.data.shards import ShardSource
from unidiff.data.tar import read_shard


class Handler(http.server.SimpleHTTPRequestHandler):
    timeout = 20

    def log_message(self, *args):
        pass

    def do_GET(self):
        if "cut" in self.path:  # promises everything, sends 60 %
            data = Path(self.translate_path(self.path.replace("cut", "00000"))).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: int(len(data) * 0.6)])
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_WR)
            self.rfile.read(1)  # until the client hangs up: an early close may throw away what is still on its way
            self.close_connection = True
        else:
            super().do_GET()


@pytest.fixture()
def server(tmp_path, monkeypatch):
    monkeypatch.setattr(addresses, "PAUSES", (0.0,))
    write_samples(tmp_path, 20, 10)
    handler = type("H", (Handler,), {"__init__": lambda self, *a: Handler.__init__(self, *a, directory=str(tmp_path))})
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()


def test_shards_by_url(server):
    source = ShardSource(f"{server}/{{00000,00001}}.tar", shuffle=5)
    assert len({s["__key__"] for s in source}) == 20
    assert source.report.total == 0


def test_vanished_and_cut_downloads_are_counted(server):
    source = ShardSource(f"{server}/{{nothing,cut,00001}}.tar")
    keys = [s["__key__"] for s in source]
    assert keys[-10:] == [f"{n:06d}" for n in range(10, 20)]
    assert 1 <= len(keys) - 10 < 10
    assert source.report.counts == {report.MISSING_SHARD: 1, report.TRUNCATED_SHARD: 1}
    assert [skip.shard for skip in source.report.examples[report.MISSING_SHARD]] == [f"{server}/nothing.tar"]


def test_what_arrived_is_read_although_the_download_has_failed_already(server):
    stream = read_shard(f"{server}/cut.tar")
    first = next(stream)
    items = [first, *stream]
    assert [item["__key__"] for item in items[:-1]] == [f"{n:06d}" for n in range(len(items) - 1)]
    assert len(items) > 2 and isinstance(items[-1], Skip) and items[-1].reason == report.TRUNCATED_SHARD


def test_leaving_a_download_early_is_clean(server):
    stream = iter(ShardSource(f"{server}/00000.tar"))
    assert next(stream)["__key__"] == "000000"
    stream.close()
