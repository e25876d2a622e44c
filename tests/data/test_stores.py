"""Shards, tokens, runs and models in a store of fsspec, and downloads that go on where they broke."""

from __future__ import annotations

import http.server
import socket
import threading
from pathlib import Path

import fsspec
import pytest
from shard_samples import write_samples
from train_fixtures import TINY, VOCABULARY, tiny_table

from unidiff import addresses, hub, mirror
from unidiff.addresses import Unreachable, download, fetch, remote_stamp
from unidiff.data.manifest import TokenManifest
from unidiff.data.shards import ShardSource
from unidiff.data.sources import expand_shards
from unidiff.data.tar import ShardWriter
from unidiff.mirror import local_folder, pulled
from unidiff.train.config import read_config
from unidiff.train.pretrain import pretrain


@pytest.fixture
def store(monkeypatch):
    """An empty store in memory, without waiting between tries."""
    for module in (addresses, mirror):
        monkeypatch.setattr(module, "PAUSES", (0.0, 0.0))
    pulled.cache_clear()
    system = fsspec.filesystem("memory")
    for name in system.ls("/", detail=False):
        system.rm(name, recursive=True)
    yield system
    for name in system.ls("/", detail=False):
        system.rm(name, recursive=True)


def tiny_shards(folder: Path) -> Path:
    """The rows of `tiny_table` as token shards."""
    tensors = tiny_table(40).tensors
    with ShardWriter(folder, 10) as writer:
        for number, (codes, captions) in enumerate(zip(tensors["codes"], tensors["captions"], strict=True)):
            writer.write(f"{number:03d}", {"codes.npy": codes.numpy(), "text.npy": captions[0].numpy()})
    TokenManifest(VOCABULARY.to_dict(), 1, 6, (3, 3), dict(writer.written)).save(folder)
    return folder


def put(system, folder: Path, where: str) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            system.pipe_file(f"{where}/{path.relative_to(folder).as_posix()}", path.read_bytes())


def test_shards_in_a_store(store, tmp_path):
    keys = write_samples(tmp_path / "raw", 12, 5)
    put(store, tmp_path / "raw", "/bucket/raw")
    assert [len(expand_shards(p)) for p in ("memory://bucket/raw", "memory://bucket/raw/*.tar")] == [3, 3]
    assert expand_shards("memory://bucket/raw/{00000,00009}.tar")[1] == "memory://bucket/raw/00009.tar"
    source = ShardSource("memory://bucket/raw")
    assert [sample["__key__"] for sample in source] == keys and not source.report.total
    lost = ShardSource("memory://bucket/raw/{00000,00009}.tar")
    assert len(list(lost)) == 5 and lost.report.counts == {"missing_shard": 1}
    assert remote_stamp("memory://bucket/raw/00000.tar")["size"] == (tmp_path / "raw" / "00000.tar").stat().st_size
    with pytest.raises(ValueError, match=r"holds no \.tar shards"):
        expand_shards("memory://bucket/raw/*.zip")
    with pytest.raises(Unreachable, match="is larger than"):
        fetch("memory://bucket/raw/00000.tar", 100)


def test_a_store_without_its_package_is_named(store):
    try:
        import ocifs  # noqa: F401
    except ImportError:
        with pytest.raises(Unreachable, match="pip install ocifs"):
            fetch("oci://bucket@space/x.tar", 100)


def test_commands_read_and_write_stores(store, run, tmp_path):
    from PIL import Image

    (tmp_path / "mine").mkdir()
    for number in range(4):
        Image.new("RGB", (8, 8), (40 * number, 0, 0)).save(tmp_path / "mine" / f"{number}.png")
        (tmp_path / "mine" / f"{number}.txt").write_text(f"number {number}")
    status, said, err = run("shards", tmp_path / "mine", "memory://bucket/mine")
    assert status == 0 and "4 samples" in said, err
    assert {Path(name).name for name in store.find("/bucket/mine")} == {"00000.tar", "shards.json"}
    status, said, _ = run("data", "check", "memory://bucket/mine")
    assert status == 0 and "8 x 8: 4" in said


@pytest.mark.training
def test_a_run_in_a_store_goes_on_and_its_model_loads(store, tmp_path):
    put(store, tiny_shards(tmp_path / "tokens"), "/bucket/tokens")
    settings = [*TINY, "output=memory://bucket/run", "data.train=memory://bucket/tokens/", "logging.every=1"]
    assert pretrain(read_config(None, [*settings, "steps=2"]), {}) == 0
    names = {name.removeprefix("/bucket/run/") for name in store.find("/bucket/run")}
    assert {"model/config.json", "checkpoints/latest", "metrics.jsonl", "config.yaml"} <= names
    assert not any("/." in name or name.startswith(".") for name in names)
    assert pretrain(read_config(None, [*settings, "steps=3"]), {}) == 0
    steps = [line for line in store.cat_file("/bucket/run/metrics.jsonl").decode().splitlines() if '"train"' in line]
    assert len(steps) == 3
    assert (hub.locate("memory://bucket/run/model") / "config.json").is_file()
    with pytest.raises(Unreachable, match="holds nothing"):
        hub.locate("memory://bucket/nothing")


def test_what_changes_is_written_and_what_goes_is_removed(store, monkeypatch):
    store.pipe_file("/bucket/x/old.txt", b"old")
    store.pipe_file("/bucket/x/kept.txt", b"kept")
    with pytest.raises(RuntimeError), local_folder("memory://bucket/x") as place:
        (place / "old.txt").unlink()
        (place / "new").mkdir()
        (place / "new" / "a.txt").write_text("a")
        (place / ".hidden").write_text("no")
        raise RuntimeError("a run that fails keeps what it wrote")
    assert store.find("/bucket/x") == ["/bucket/x/kept.txt", "/bucket/x/new/a.txt"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="several processes"), local_folder("memory://bucket/x"):
        pass


class Broken(http.server.BaseHTTPRequestHandler):
    """Gives half of what is left of its content at a time, from where it is asked to."""

    content, asked = bytes(range(256)) * 400, []
    parts = True

    def log_message(self, *args):
        pass

    def do_GET(self):
        given = self.headers.get("Range")
        self.asked.append(given)
        start = int(given[len("bytes=") : -1]) if given and self.parts else 0
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(self.content) - 1}/{len(self.content)}")
        self.send_header("Content-Length", str(len(self.content) - start))
        self.end_headers()
        rest = self.content[start:]
        self.wfile.write(rest if len(self.asked) > 2 else rest[: len(rest) // 2])
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_WR)
        self.rfile.read(1)
        self.close_connection = True


@pytest.mark.parametrize("parts", [True, False])
def test_a_download_goes_on_where_it_broke(tmp_path, monkeypatch, parts):
    monkeypatch.setattr(addresses, "PAUSES", (0.0, 0.0))
    handler = type("H", (Broken,), {"asked": [], "parts": parts})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with open(tmp_path / "got", "wb") as file:
            download(f"http://127.0.0.1:{server.server_port}/x", file)
    finally:
        server.shutdown()
    assert (tmp_path / "got").read_bytes() == Broken.content
    half = len(Broken.content) // 2
    assert handler.asked == [None, f"bytes={half}-", f"bytes={half + half // 2 if parts else half}-"]


def test_a_download_tells_how_far_it_is(store, monkeypatch):
    from huggingface_hub.utils import tqdm

    store.pipe({"/bucket/m/a.bin": b"a" * 700, "/bucket/m/deep/b.bin": b"b" * 500, "/bucket/alone.bin": b"c" * 30})
    shown, moves, begin = [], [], tqdm.__init__

    def start(bar, **options):
        shown.append(options)
        begin(bar, **{**options, "disable": True})

    def update(bar, more):
        bar.n += more
        moves.append(bar.n)

    monkeypatch.setattr(tqdm, "__init__", start)
    monkeypatch.setattr(tqdm, "update", update)
    place = pulled("memory://bucket/m")
    assert (place / "deep" / "b.bin").read_bytes() == b"b" * 500
    assert moves == sorted(moves) and moves[-1] == shown[0]["total"] == 1200
    assert shown[0]["delay"] == 2 and shown[0]["disable"] is None  # on a terminal, after two seconds
    assert pulled("memory://bucket/alone.bin").read_bytes() == b"c" * 30 and moves[-1] == shown[1]["total"] == 30
