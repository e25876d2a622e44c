"""Interleaved documents from tars to token shards and back."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from shard_samples import MeanColourTokenizer, picture, skipped_keys

from unidiff.data import report
from unidiff.data.encode import EncodeSettings, encode_shards
from unidiff.data.manifest import MANIFEST, TokenManifest
from unidiff.data.members import encode_member
from unidiff.data.report import SkipReport, Unusable
from unidiff.data.rows import document_parts, lay_out
from unidiff.data.shards import ImagePreprocess
from unidiff.data.tar import ShardWriter
from unidiff.data.token_set import DOCUMENTS, PAIRS, TokenSet
from unidiff.tokens.text import TextTokenizer

LENGTH = 60  # tokens; a picture is 16 codes
SETTINGS = EncodeSettings(image_size=16, text_length=LENGTH, batch_size=3, samples_per_shard=4, documents=True)


@pytest.fixture(scope="module")
def text():
    return TextTokenizer.train([f"document {n} begins and ends" for n in range(50)], 300)


def members(number: int) -> dict:
    """Document n: n % 4 pictures between texts; every fourth is text alone."""
    count = number % 4
    texts, images = [f"document {number} begins"], [None]
    for n in range(count):
        texts += [None, f"and {n}"]
        images += [f"{n}.png", None]
    data = {"json": {"texts": texts, "images": images}}
    return data | {f"{n}.png": picture(10 * number + n) for n in range(count)}


def write_documents(folder: Path, count: int, change=None) -> None:
    with ShardWriter(folder, 5) as writer:
        for number in range(count):
            data = {name: encode_member(name, value) for name, value in members(number).items()}
            writer.write(f"{number:03d}", data if change is None else change(number, data))


def test_documents_become_tokens(tmp_path, text):
    write_documents(tmp_path / "raw", 11)
    image, prepare = MeanColourTokenizer(), ImagePreprocess(16, 4)
    manifest = encode_shards(str(tmp_path / "raw"), image, text, tmp_path / "out", SETTINGS)
    assert (manifest.kind, manifest.samples, manifest.grid, manifest.text_length) == ("documents", 11, (4, 4), LENGTH)
    assert TokenManifest.load(str(tmp_path / "out")) == manifest
    rows = TokenSet.open(str(tmp_path / "out"), 0, SkipReport(), DOCUMENTS)
    seen = {}
    for draw in range(11):
        row = rows.draw(draw)
        tokens, starts = row.tokens.tolist(), row.images.tolist()
        words, place = [], 0
        for start in [*starts, len(tokens)]:
            words += tokens[place:start]
            place = start + 16
        number = int(text.decode(words).split()[1])
        seen[number] = True
        assert len(starts) == number % 4
        for n, start in enumerate(starts):
            expected = image.encode(prepare(picture(10 * number + n))[None])[0]
            assert tokens[start : start + 16] == expected.flatten().tolist()
        whole = len(words) == len([i for i in words if i != text.eos_id]) + 1
        assert whole == (tokens[-1] == text.eos_id)
    assert len(seen) == 11 and rows.draw(3).tokens.equal(rows.draw(3).tokens)
    cut = sum(rows.draw(d).tokens[-1] != text.eos_id for d in range(11))
    assert manifest.cut_captions == cut


def test_an_interrupted_encoding_continues(tmp_path, text):
    write_documents(tmp_path / "raw", 11)
    image = MeanColourTokenizer()
    encode_shards(str(tmp_path / "raw"), image, text, tmp_path / "whole", SETTINGS)

    def stop(count, skipped):
        if count >= 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode_shards(str(tmp_path / "raw"), image, text, tmp_path / "cut", SETTINGS, on_shard=stop)
    encode_shards(str(tmp_path / "raw"), image, text, tmp_path / "cut", SETTINGS)
    names = sorted(p.name for p in (tmp_path / "whole").iterdir())
    assert names == sorted(p.name for p in (tmp_path / "cut").iterdir()) and MANIFEST in names
    for name in names:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()


def test_damaged_documents_are_counted(tmp_path, text):
    def change(number, data):
        if number == 1:
            data["0.png"] = data["0.png"][:40]
        if number == 2:
            del data["1.png"]
        if number == 3:
            data["json"] = b'{"texts": ["a"], "images": []}'
        if number == 4:
            data["json"] = b"\xff"
        return data

    write_documents(tmp_path / "raw", 8, change)
    manifest = encode_shards(str(tmp_path / "raw"), MeanColourTokenizer(), text, tmp_path / "out", SETTINGS)
    skipped = SkipReport.from_state_dict(manifest.skipped)
    assert manifest.samples == 4
    assert {r: skipped_keys(skipped, r) for r in skipped.counts} == {
        report.CORRUPT_IMAGE: ["001"],
        report.MISSING_MEMBER: ["002"],
        report.BAD_JSON: ["003", "004"],
    }


def test_what_a_document_may_say():
    images = {"0.jpg": picture(0)}
    assert document_parts({"texts": [" a ", None, "  "], "images": [None, "0.jpg", None]}, images)[0] == "a"
    for metadata, words in (
        ([], "lists `texts` and `images`"),
        ({"texts": ["a"]}, "lists `texts` and `images`"),
        ({"texts": ["a", "b"], "images": [None]}, "as long as each other"),
        ({"texts": ["a"], "images": ["0.jpg"]}, "place 0 must have a text or the name"),
        ({"texts": [None], "images": [None]}, "place 0"),
        ({"texts": [3], "images": [None]}, "place 0"),
        ({"texts": [None], "images": ["1.jpg"]}, "'1.jpg' is not in the sample"),
        ({"texts": [" "], "images": [None]}, "without text and pictures"),
    ):
        with pytest.raises(Unusable, match=words):
            document_parts(metadata, images)


def test_long_documents_are_cut(text):
    codes = np.arange(16).reshape(4, 4)
    words = text.encode("document 1 begins")
    n = len(words)
    whole = lay_out(["document 1 begins", codes], text, n + 17)
    assert not whole.cut and whole.tokens.tolist() == [*words, *range(16), text.eos_id] and whole.images.tolist() == [n]
    tight = lay_out(["document 1 begins", codes], text, n + 16)  # no room for EOS
    assert tight.cut and len(tight.tokens) == n + 16
    without = lay_out(["document 1 begins", codes, "and"], text, n + 15)  # a picture is never cut in two
    assert without.cut and without.tokens.tolist() == words and len(without.images) == 0
    inside = lay_out([codes, "document 1 begins"], text, 18)
    assert inside.cut and inside.tokens.tolist() == [*range(16), *words[:2]]


def test_bad_shards_of_documents(tmp_path, text):
    write_documents(tmp_path / "raw", 5)
    with pytest.raises(ValueError, match="text_length = 16 leaves no room beside a picture of 16 tokens"):
        small = EncodeSettings(16, 16, documents=True)
        encode_shards(str(tmp_path / "raw"), MeanColourTokenizer(), text, tmp_path / "no", small)
    encode_shards(str(tmp_path / "raw"), MeanColourTokenizer(), text, tmp_path / "out", SETTINGS)
    with pytest.raises(ValueError, match=r"holds documents, not pairs; name it in data.documents"):
        TokenSet.open(str(tmp_path / "out"), 0, SkipReport(), PAIRS)
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    damaged = {
        "000": {"tokens.npy": np.arange(5), "images.npy": np.array([0])},  # a picture of 5 tokens
        "001": {"tokens.npy": np.full(20, 10**6), "images.npy": np.array([], np.int64)},
        "002": {"tokens.npy": np.full(20, 64), "images.npy": np.array([2])},  # codes are below 64
        "003": {"tokens.npy": np.full(40, 3), "images.npy": np.array([0, 8])},  # overlap
        "004": {"tokens.npy": np.full(20, 3), "images.npy": np.array([4])},
    }
    with ShardWriter(tmp_path / "bad", 5) as writer:
        for key, value in damaged.items():
            writer.write(key, value)
    manifest["shards"] = {"00000.tar": 5}
    (tmp_path / "bad" / MANIFEST).write_text(json.dumps(manifest))
    account = SkipReport()
    rows = TokenSet.open(str(tmp_path / "bad"), 0, account, DOCUMENTS)
    assert {tuple(rows.draw(n).images.tolist()) for n in range(5)} == {(4,)}
    assert skipped_keys(account, report.BAD_ARRAY) == ["000", "001", "002", "003"]
    assert torch.equal(rows.draw(0).tokens, torch.full((20,), 3, dtype=torch.int32))
