import json

import numpy as np
import pytest
import torch
from shard_samples import MeanColourTokenizer, sample, skipped_keys, truncate, write_samples

from unidiff.data import report
from unidiff.data.encode import EncodeSettings, encode_shards
from unidiff.data.manifest import MANIFEST, TokenManifest
from unidiff.data.members import decode_member
from unidiff.data.shards import ImagePreprocess
from unidiff.data.sources import expand_shards
from unidiff.data.tar import read_shard
from unidiff.tokens import Vocabulary
from unidiff.tokens.text import TextTokenizer

SETTINGS = EncodeSettings(image_size=16, text_length=24, batch_size=4, samples_per_shard=6, workers=2)


@pytest.fixture(scope="module")
def text():
    return TextTokenizer.train([f"caption {n} which?" for n in range(50)], 300)


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def rows(folder):
    for url in expand_shards(str(folder)):
        for raw in read_shard(url):
            yield {n: decode_member(n, d) for n, d in raw.items() if not n.startswith("__")} | {"key": raw["__key__"]}


def test_encoding(tmp_path, text):
    write_samples(tmp_path / "raw", 20, 10)
    image = MeanColourTokenizer()
    manifest = encode_shards(str(tmp_path / "raw"), image, text, tmp_path / "out", SETTINGS)
    assert manifest.samples == 20 and manifest.questions == 20 and manifest.grid == (4, 4)
    assert manifest.shards == {"00000.tar": 6, "00001.tar": 6, "00002.tar": 6, "00003.tar": 2}
    assert set(contents(tmp_path / "out")) == {*manifest.shards, MANIFEST}
    vocabulary = Vocabulary.from_dict(manifest.vocabulary)
    assert vocabulary == Vocabulary.unified(text.size, 64, text.specials())
    assert TokenManifest.load(str(tmp_path / "out")) == manifest
    prepare = ImagePreprocess(16, 4)
    for number, row in enumerate(rows(tmp_path / "out")):
        assert row["json"] == {"key": f"{number:06d}", "shard": str(tmp_path / "raw" / f"0000{number // 10}.tar")}
        assert row["codes.npy"].dtype == np.int16 and row["text.npy"].dtype == np.int32
        words = [i for i in row["text.npy"].tolist() if i != text.eos_id]
        assert words[0] == text.special("caption") and text.decode(words[1:]) == f"caption {number}"
        assert len(row["text.npy"]) == 24 and row["text.npy"][-1] == text.eos_id
        start = int(row["answer_start.npy"][0])
        question = row["questions.npy"][0].tolist()
        assert text.decode(question[:start]) == "which?" and text.decode(question[start:]) == str(number)
        if number % 3 != 1:  # lossless pictures
            kind = ("png", "jpg", "webp")[number % 3]
            expected = image.encode(prepare(sample(number)[kind])[None])[0]
            assert np.array_equal(row["codes.npy"], expected.numpy())


def test_damage_goes_into_the_manifest(tmp_path, text):
    def change(number, members):
        if number == 3:
            members["txt"] = b"\xff"
        if number == 4:
            members["json"] = json.dumps({"qa": [["which?" * 9, "long"], ["which?", "4"]]}).encode()
        if number == 6:
            members["txt"] = b"caption " * 40
        return members

    write_samples(tmp_path / "raw", 10, 10, change)
    pattern = str(tmp_path / "raw" / "{00000,00001}.tar")
    with pytest.raises(FileNotFoundError, match=r"1 shard does not exist: .*00001\.tar"):
        encode_shards(pattern, MeanColourTokenizer(), text, tmp_path / "o", SETTINGS)
    manifest = encode_shards(pattern, MeanColourTokenizer(), text, tmp_path / "o", SETTINGS, allow_missing=True)
    assert manifest.samples == 9 and manifest.questions == 9
    assert manifest.cut_captions == 1 and manifest.long_questions == 1
    account = report.SkipReport.from_state_dict(manifest.skipped)
    assert account.counts == {report.BAD_CAPTION: 1, report.MISSING_SHARD: 1}
    assert skipped_keys(account, report.BAD_CAPTION) == ["000003"]


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_stopped_run_continues_to_the_same_files(tmp_path, text, stop):
    write_samples(tmp_path / "raw", 20, 10, lambda n, m: m | {"txt": b"\xff"} if n in (2, 13) else m)
    image, source = MeanColourTokenizer(), str(tmp_path / "raw")
    encode_shards(source, image, text, tmp_path / "whole", SETTINGS)
    calls = []

    def interrupt(count, account):
        calls.append(count)
        if len(calls) == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode_shards(source, image, text, tmp_path / "parts", SETTINGS, on_shard=interrupt)
    assert not (tmp_path / "parts" / MANIFEST).exists()
    (tmp_path / "parts" / ".00009.123.tmp").write_bytes(b"half a shard")  # what a kill leaves behind
    encode_shards(source, image, text, tmp_path / "parts", SETTINGS, on_shard=lambda count, _: calls.append(count))
    assert calls == [6, 12, 18]
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_a_finished_folder_is_reused_or_refused(tmp_path, text):
    write_samples(tmp_path / "raw", 6, 10)
    source, out = str(tmp_path / "raw"), tmp_path / "out"
    first = encode_shards(source, MeanColourTokenizer(), text, out, SETTINGS)
    before = contents(out)
    workers = EncodeSettings(16, 24, 4, 6, workers=0)  # threads change nothing
    again = encode_shards(source, MeanColourTokenizer(), text, out, workers, on_shard=lambda *_: pytest.fail("encoded"))
    assert again == first and contents(out) == before
    with pytest.raises(ValueError, match="another run"):
        encode_shards(source, MeanColourTokenizer(), text, out, EncodeSettings(16, 20))
    other = MeanColourTokenizer()
    other.codebook_size = 32
    with pytest.raises(ValueError, match="another run"):
        encode_shards(source, other, text, out, SETTINGS)
    with pytest.raises(ValueError, match="already holds tar files"):
        encode_shards(source, MeanColourTokenizer(), text, tmp_path / "raw", SETTINGS)


def test_what_cannot_be_encoded(tmp_path, text):
    write_samples(tmp_path / "raw", 3, 10)
    source = str(tmp_path / "raw")
    with pytest.raises(ValueError, match="multiple of the tokenizer factor 4"):
        encode_shards(source, MeanColourTokenizer(), text, tmp_path / "o", EncodeSettings(image_size=18))
    with pytest.raises(ValueError, match="no special token 'caption'"):
        encode_shards(
            source, MeanColourTokenizer(), TextTokenizer.train(["x"], 300, ("eos",)), tmp_path / "o", SETTINGS
        )
    with pytest.raises(ValueError, match="text_length is 2; expected a whole number from 3"):
        EncodeSettings(text_length=2)
    truncate(tmp_path / "raw" / "00000.tar", 700)
    with pytest.raises(ValueError, match="no usable sample in 1 shards; skipped 1"):
        encode_shards(source, MeanColourTokenizer(), text, tmp_path / "o", SETTINGS)
    assert not (tmp_path / "o").exists() or not list((tmp_path / "o").iterdir())


def test_questions_that_are_none_are_counted(tmp_path, text):
    odd = [{"qa": [["which?", "a"], ["which?"], ["", "a"], [1, 2], "no"]}, {"qa": "which?"}, {"qa": None}, ["qa"], {}]
    write_samples(tmp_path / "raw", 5, 10, lambda n, m: m | {"json": json.dumps(odd[n]).encode()})
    manifest = encode_shards(str(tmp_path / "raw"), MeanColourTokenizer(), text, tmp_path / "o", SETTINGS)
    assert (manifest.samples, manifest.questions, manifest.bad_questions) == (5, 1, 5)


def test_empty_captions_are_counted(tmp_path, text):
    words = [b"", b" \n", b"\xef\xbb\xbf", b"\xef\xbb\xbfcaption 3", b"caption 4"]
    write_samples(tmp_path / "raw", 5, 10, lambda n, m: m | {"txt": words[n]})
    manifest = encode_shards(str(tmp_path / "raw"), MeanColourTokenizer(), text, tmp_path / "o", SETTINGS)
    assert manifest.skipped["counts"] == {report.EMPTY_CAPTION: 3}
    first = next(rows(tmp_path / "o"))["text.npy"].tolist()
    assert text.decode([i for i in first[1:] if i != text.eos_id]) == "caption 3"


def test_json_that_is_no_unicode_is_counted(tmp_path, text):
    def change(number, members):
        return members | {"json": b'{"qa": [["which?", "\\ud800"]]}'} if number == 1 else members

    write_samples(tmp_path / "raw", 3, 10, change)
    manifest = encode_shards(str(tmp_path / "raw"), MeanColourTokenizer(), text, tmp_path / "o", SETTINGS)
    assert manifest.samples == 2 and manifest.skipped["counts"] == {report.BAD_JSON: 1}


def test_large_codebooks_need_wider_codes(tmp_path, text):
    class Wide(MeanColourTokenizer):
        codebook_size = 2**17

        def encode(self, images):
            return torch.full((len(images), 4, 4), 100_000)

    write_samples(tmp_path / "raw", 1, 10)
    encode_shards(str(tmp_path / "raw"), Wide(), text, tmp_path / "o", SETTINGS)
    assert next(rows(tmp_path / "o"))["codes.npy"].tolist() == [[100_000] * 4] * 4


@pytest.mark.parametrize("content", ["", "[]", "{", '{"format": 2}', '{"format": 1, "vocabulary": {}}'])
def test_manifests_that_are_none(tmp_path, content):
    (tmp_path / MANIFEST).write_text(content)
    with pytest.raises(ValueError, match="is not a token manifest"):
        TokenManifest.load(str(tmp_path))


def test_manifest_sources(tmp_path):
    with pytest.raises(FileNotFoundError, match="`unidiff encode` writes it"):
        TokenManifest.load(str(tmp_path))
    with pytest.raises(ValueError, match="shell command"):
        TokenManifest.load(f"pipe:touch {tmp_path}/ran;")
    assert not list(tmp_path.iterdir())


def test_a_run_that_is_killed_between_its_first_shard_and_the_note_of_it_continues(tmp_path, text, monkeypatch):
    write_samples(tmp_path / "raw", 9, 9)
    settings = EncodeSettings(image_size=16, text_length=20, samples_per_shard=4)
    command = (str(tmp_path / "raw"), MeanColourTokenizer(), text)
    encode_shards(*command, tmp_path / "whole", settings)

    def killed(path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("unidiff.data.encode.token_stamp", killed)
        with pytest.raises(KeyboardInterrupt):
            encode_shards(*command, tmp_path / "cut", settings)
    assert [path.name for path in (tmp_path / "cut").glob("*.tar")] == ["00000.tar"]
    encode_shards(*command, tmp_path / "cut", settings)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
