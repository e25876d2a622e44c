"""Tokens and the data that they were made from: what changed since, what is damaged, and who else is at work."""

import http.server
import json
import logging
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from shard_samples import MeanColourTokenizer, truncate, write_samples

from unidiff import addresses
from unidiff.data import report
from unidiff.data.encode import PROGRESS, EncodeSettings, encode_shards
from unidiff.data.manifest import MANIFEST, TokenManifest, changes, source_stamps
from unidiff.tokens.text import TextTokenizer
from unidiff.train.data.shard_source import open_shards

SETTINGS = EncodeSettings(image_size=16, text_length=16, batch_size=4, samples_per_shard=5, workers=0)


@pytest.fixture(scope="module")
def text():
    return TextTokenizer.train([f"caption {n} which?" for n in range(50)], 300)


@pytest.fixture
def encode(tmp_path, text):
    write_samples(tmp_path / "raw", 20, 10)

    def run(out="out", **options):
        raw = options.pop("raw", str(tmp_path / "raw"))
        return encode_shards(raw, MeanColourTokenizer(), text, tmp_path / out, SETTINGS, **options)

    return run


def replace_by_more(raw):
    write_samples(raw, 20, 10, lambda n, m: m | {"txt": b"caption 7 and more"})


def keep_size_and_time(raw):
    path = raw / "00001.tar"
    status, data = path.stat(), path.read_bytes()
    path.write_bytes(data.replace(b"caption 15", b"caption 51"))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def cut(raw):
    truncate(raw / "00001.tar", 5000)


def touch(raw):
    os.utime(raw / "00000.tar", (1, 1))


CHANGES = {"replaced": replace_by_more, "same size and time": keep_size_and_time, "cut": cut, "touched": touch}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("stopped", [False, True])
def test_changed_raw_shards_are_noticed(tmp_path, encode, change, stopped, caplog):
    def stop(count, _):
        if stopped and count >= 10:
            raise KeyboardInterrupt

    try:
        encode(on_shard=stop)
    except KeyboardInterrupt:
        assert (tmp_path / "out" / PROGRESS).is_file()
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    CHANGES[change](tmp_path / "raw")
    with pytest.raises(ValueError, match=r"raw shards have changed since: .*0000\d\.tar \(.*remove that folder"):
        encode()
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before
    with caplog.at_level(logging.WARNING):
        again = encode(again=True)
    assert "is encoded again: raw shards have changed" in caplog.text
    assert again == encode("fresh")
    for name in again.shards:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "fresh" / name).read_bytes()
    assert encode() == again  # and is known again


def test_the_cache_of_a_training_run_follows_its_data(tmp_path, text, caplog):
    write_samples(tmp_path / "raw", 6, 10)
    arguments = (str(tmp_path / "raw"), 0, tmp_path / "cache", MeanColourTokenizer(), text, SETTINGS)
    first = open_shards(*arguments)
    write_samples(tmp_path / "raw", 9, 10)
    with caplog.at_level(logging.WARNING):
        second = open_shards(*arguments)
    assert (first.rows, second.rows) == (6, 9) and "encoded again" in caplog.text
    (tmp_path / "cache" / "set0" / "00001.tar").unlink()  # the cache itself was damaged
    assert open_shards(*arguments).rows == 9 and (tmp_path / "cache" / "set0" / "00001.tar").is_file()


def test_manifests_from_before_there_were_stamps(tmp_path, encode, caplog):
    encode()
    path = tmp_path / "out" / MANIFEST
    content = json.loads(path.read_text())
    del content["sources"], content["files"], content["kind"]
    path.write_text(json.dumps(content))
    with caplog.at_level(logging.WARNING):
        assert encode().sources == {}
    assert "whether that changed is unknown" in caplog.text
    assert open_shards(str(tmp_path / "out")).rows == 20


@pytest.mark.parametrize("how", ["flip", "replace", "more"])
def test_token_shards_that_are_not_those_written(tmp_path, encode, how, caplog):
    encode()
    path = tmp_path / "out" / "00001.tar"
    if how == "flip":
        data = bytearray(path.read_bytes())
        place = data.index(b"\x93NUMPY") + 128
        data[place] ^= 1
        path.write_bytes(data)
    elif how == "replace":
        path.write_bytes((tmp_path / "out" / "00000.tar").read_bytes())
    else:
        EncodeSettings(16, 16, 4, 6)
        encode_shards(
            str(tmp_path / "raw"),
            MeanColourTokenizer(),
            TextTokenizer.train(["a"], 300),
            tmp_path / "six",
            EncodeSettings(16, 16, 4, 6),
        )
        path.write_bytes((tmp_path / "six" / "00001.tar").read_bytes())
    source = open_shards(str(tmp_path / "out"))
    with caplog.at_level(logging.WARNING):
        source.fetch(torch.arange(20))
    assert source.report.counts == {report.CHANGED_SHARD: 1} and "00001.tar" in caplog.text
    with pytest.raises(ValueError, match=r"token shards are not as they were written: 00001\.tar"):
        encode()


def test_a_resumed_encoding_notices_that_its_own_shards_were_lost(tmp_path, encode):
    def stop(count, _):
        if count >= 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode(on_shard=stop)
    (tmp_path / "out" / "00000.tar").unlink()
    with pytest.raises(ValueError, match=r"unfinished run that no longer fits: .*00000\.tar \(missing\)"):
        encode()


def test_two_encodings_in_one_folder(tmp_path, encode):
    code = f"from unidiff.files import locked\nwith locked({str(tmp_path / 'out')!r}, 'encoding'): print('on', flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as first:
        assert first.stdout.readline() == "on\n"
        live = tmp_path / "out" / f".00000.tar.{os.uname().nodename}-{first.pid}.tmp"
        live.write_bytes(b"half a shard of a live process")
        with pytest.raises(ValueError, match=rf"is in use by process {first.pid} on .*name another output folder"):
            encode()
        assert live.exists()
        first.communicate("\n")
    assert encode().samples == 20
    assert not live.exists()  # its process is gone


def test_a_full_disk_names_the_file_and_loses_nothing(tmp_path, encode):
    whole = encode("whole")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        with pytest.raises(OSError, match=r"00000\.tar"):
            encode()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list((tmp_path / "out").iterdir())
    assert encode().shards == whole.shards


@pytest.mark.slow
def test_kills_change_nothing(tmp_path, encode):
    encode("whole")
    whole = {p.name: p.read_bytes() for p in (tmp_path / "whole").iterdir()}
    rng = random.Random(3)
    for _ in range(15):
        child = os.fork()
        if child == 0:
            try:
                encode()
            finally:
                os._exit(0)
        time.sleep(rng.uniform(0.005, 0.1))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    encode()
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == whole


def test_an_output_that_is_no_folder(tmp_path, encode):
    (tmp_path / "out").write_text("notes")
    with pytest.raises(OSError, match="out"):
        encode()
    assert (tmp_path / "out").read_text() == "notes"


class Server(http.server.BaseHTTPRequestHandler):
    headers_by_path: dict = {}  # noqa: RUF012 (set by the test)

    def do_HEAD(self):
        found = self.headers_by_path.get(self.path)
        self.send_response(404 if found is None else 200)
        for name, value in (found or {}).items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *args):
        pass


def test_stamps_of_addresses(monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    try:
        monkeypatch.setattr(Server, "headers_by_path", {"/a.tar": {"Content-Length": "10", "ETag": '"1"'}})
        with pytest.raises(FileNotFoundError, match=r"1 shard does not exist: '.*b\.tar'"):
            source_stamps([f"{url}/a.tar", f"{url}/b.tar"])
        then = source_stamps([f"{url}/a.tar", f"{url}/b.tar"], allow_missing=True)
        assert then == {f"{url}/a.tar": {"size": 10, "hash": '"1"'}, f"{url}/b.tar": {"size": -1}}
        monkeypatch.setattr(
            Server,
            "headers_by_path",
            {"/a.tar": {"Content-Length": "10", "ETag": '"2"'}, "/b.tar": {"Content-Length": "3"}},
        )
        now = source_stamps(list(then))
        assert "a.tar (other content)" in changes(then, now) and "b.tar (size missing -> 3)" in changes(then, now)
        assert changes(then, then) == ""
    finally:
        server.shutdown()
        server.server_close()
    monkeypatch.setattr(addresses, "TIMEOUT", 1.0)
    start = time.monotonic()
    assert source_stamps([f"{url}/a.tar"]) == {f"{url}/a.tar": {}}  # nobody can tell: no change is known
    assert changes(then, source_stamps([f"{url}/a.tar"])) == "" and time.monotonic() - start < 30


WRONG = [None, -1, 1.5, True, "x", [None], {"a": None}]


@pytest.mark.parametrize("name", [MANIFEST, PROGRESS])
def test_every_wrong_value_gets_a_sentence(tmp_path, encode, text, name):
    """Each value of both files is replaced by each wrong one in turn."""

    def stop(count, _):
        if name == PROGRESS and count >= 10:
            raise KeyboardInterrupt

    try:
        encode(on_shard=stop)
    except KeyboardInterrupt:
        assert name == PROGRESS
    path = tmp_path / "out" / name
    original = path.read_text()

    def places(value, where=()):
        yield where
        for key, inner in (
            value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        ):
            yield from places(inner, (*where, key))

    refused = total = 0
    for place in places(json.loads(original)):
        for wrong in WRONG:
            content = json.loads(original)
            if place:
                inner = content
                for key in place[:-1]:
                    inner = inner[key]
                inner[place[-1]] = wrong
            else:
                content = wrong
            path.write_text(json.dumps(content))
            total += 1
            try:
                if name == MANIFEST:
                    TokenManifest.load(str(tmp_path / "out"))
                    open_shards(str(tmp_path / "out")).fetch(torch.arange(3))
                encode(on_shard=lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            except (ValueError, FileNotFoundError) as error:
                refused += 1
                assert "\n" not in str(error) and str(error)
            except KeyboardInterrupt:
                assert place[:1] != ("fingerprint",), (place, wrong)
    assert refused > total / 3, (refused, total)
