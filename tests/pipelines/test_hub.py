"""What is sent to the hub: a server on loopback speaks its commit protocol and receives a pipeline that loads again."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from huggingface_hub import ModelCard
from tiny_pipeline import tiny_pipeline

from unidiff.pipeline import UniDiffPipeline
from unidiff.pipelines.card import ModelFacts
from unidiff.train.finetune import with_text_tokens

REPO = "ann/foxes"


class Hub(BaseHTTPRequestHandler):
    """One repository: files by name, weights by their hash."""

    files: dict[str, bytes]
    blobs: dict[str, bytes]
    refuses: bool

    def log_message(self, *_) -> None:
        pass

    def answer(self, status: int, content: bytes | dict | list = b"", **headers: str) -> None:
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    @property
    def here(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if "/resolve/" in path:
            held = self.files.get(path.split("/resolve/main/")[1])
            if held is None:
                return self.answer(404, X_Error_Code="EntryNotFound")
            return self.answer(200, held, ETag=hashlib.sha256(held).hexdigest(), X_Repo_Commit="0" * 40)
        if "/tree/" in path:
            entries = [{"type": "file", "path": n, "size": len(c), "oid": "0" * 40} for n, c in self.files.items()]
            return self.answer(200, entries)
        return self.answer(200, {"id": REPO, "sha": "0" * 40, "siblings": []})

    do_HEAD = do_GET

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        assert hashlib.sha256(content).hexdigest() == self.path.rpartition("/")[2]
        self.blobs[self.path.rpartition("/")[2]] = content
        self.answer(200)

    def do_POST(self) -> None:
        path, content = self.path.partition("?")[0], self.rfile.read(int(self.headers["Content-Length"]))
        if self.refuses:
            return self.answer(403, {"error": "you may not write here"})
        if path == "/api/repos/create":
            return self.answer(200, {"url": f"{self.here}/{REPO}"})
        if path.endswith("/objects/batch"):
            found = [
                {**o, "actions": {"upload": {"href": f"{self.here}/lfs/{o['oid']}"}}}
                for o in json.loads(content)["objects"]
            ]
            return self.answer(200, {"transfer": "basic", "objects": found})
        if "/preupload/" in path:
            modes = [
                {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular"}
                for f in json.loads(content)["files"]
            ]
            return self.answer(200, {"files": [{**mode, "shouldIgnore": False} for mode in modes]})
        if "/paths-info/" in path:
            return self.answer(200, [])
        if "/commit/" in path:
            for line in map(json.loads, content.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    self.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    self.files[value["path"]] = self.blobs[value["oid"]]
            return self.answer(
                200, {"success": True, "commitOid": "0" * 40, "commitUrl": f"{self.here}/{REPO}/commit/0"}
            )
        return self.answer(200, {"errors": [], "warnings": []})  # of a card's metadata


@pytest.fixture
def hub(monkeypatch) -> Iterator[tuple[str, type[Hub]]]:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    handler = type("OneHub", (Hub,), {"files": {}, "blobs": {}, "refuses": False})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", handler
    server.shutdown()
    server.server_close()


def test_a_pipeline_is_sent_and_what_arrives_loads_again(hub, tmp_path):
    address, received = hub
    pipe, facts = tiny_pipeline(), ModelFacts(REPO, license="cc-by-4.0", results={"EmojiEval": {"caption": 0.9}})
    where = pipe.push_to_hub(REPO, endpoint=address, token="hf_x", facts=facts, variant="fp32", commit_message="Foxes")
    assert where.startswith(f"{address}/{REPO}/commit/")
    for name, content in received.files.items():
        (tmp_path / "m" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "m" / name).write_bytes(content)
    again = UniDiffPipeline.from_pretrained(tmp_path / "m", variant="fp32")
    assert torch.equal(again("a dog", generator=3).ids, pipe("a dog", generator=3).ids)
    card = ModelCard.load(tmp_path / "m" / "README.md")
    assert card.data.license == "cc-by-4.0" and card.data.eval_results[0].dataset_name == "EmojiEval"
    pipe.push_to_hub(REPO, endpoint=address, token="hf_x")
    assert b"EmojiEval" not in received.files["README.md"] and REPO.encode() in received.files["README.md"]
    received.files["README.md"] = mine = b"My own words.\n"
    pipe.push_to_hub(REPO, endpoint=address, token="hf_x", facts=facts)
    assert received.files["README.md"] == mine


def test_a_hub_that_refuses_or_is_away_is_one_sentence(hub):
    address, received = hub
    received.refuses = True
    for place in (address, "http://127.0.0.1:9"):
        with pytest.raises(ValueError, match="'ann/foxes' cannot be written on the hub") as caught:
            tiny_pipeline().push_to_hub(REPO, endpoint=place, token="hf_x")
        assert "\n" not in str(caught.value)


def test_licences_come_from_the_card_of_the_model(tmp_path):
    def card(folder):
        return (folder / "README.md").read_text(encoding="utf-8")

    emoji = UniDiffPipeline.from_pretrained("emoji")
    emoji.save_pretrained(tmp_path / "emoji")
    assert "license: apache-2.0" in card(tmp_path / "emoji")
    assert "Weights: apache-2.0. Pictures it was trained on: scenes of Noto Color Emoji" in card(tmp_path / "emoji")
    UniDiffPipeline.from_pipe(emoji).save_pretrained(tmp_path / "shared", facts=ModelFacts(license="mit"))
    assert "Weights: mit. Pictures it was trained on: scenes of Noto" in card(tmp_path / "shared")
    pipe = tiny_pipeline()
    pipe.save_pretrained(tmp_path / "none")
    assert "Weights: not stated. Pictures it was trained on: not stated." in card(tmp_path / "none")
    for text, license in (
        ("---\nlicense: cc0-1.0\n---\nMine.", "cc0-1.0"),
        ("---\nlicense: [1\n---\n", ""),
        ("Mine.", ""),
    ):
        (tmp_path / "none" / "README.md").write_text(text, encoding="utf-8")
        assert UniDiffPipeline.from_pretrained(tmp_path / "none").origin.license == license
    more = with_text_tokens(emoji, [" axolotl"])
    assert more.origin == emoji.origin and more.origin.trained_on().trained_on() == more.origin.trained_on()
