import json
import logging
import shutil
from collections import Counter

import pytest
import torch
from shard_samples import MeanColourTokenizer, truncate, write_samples
from train_fixtures import tiny_config, tiny_table

from unidiff.data import report
from unidiff.data.encode import EncodeSettings, encode_shards
from unidiff.data.token_set import is_tokenised
from unidiff.tokens.text import TextTokenizer
from unidiff.train.config import read_config
from unidiff.train.data.datasets import open_sources
from unidiff.train.data.shard_source import open_shards
from unidiff.train.trainer import Trainer

SETTINGS = EncodeSettings(image_size=16, text_length=20, samples_per_shard=7)


@pytest.fixture(scope="module")
def text():
    return TextTokenizer.train([f"caption {n} which?" for n in range(90)], 300)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, text):
    """90 rows in 13 token shards; every fourth sample has no question."""
    root = tmp_path_factory.mktemp("shards")
    write_samples(root / "raw", 90, 30, lambda n, m: m if n % 4 else {k: v for k, v in m.items() if k != "json"})
    encode_shards(str(root / "raw"), MeanColourTokenizer(), text, root / "tokens", SETTINGS)
    return root / "tokens"


def numbers(rows, text):
    """The sample numbers that the captions name."""
    return [int(text.decode(row).removeprefix("caption ")) for row in rows.captions]


def test_every_epoch_shows_every_row_once(folder, text):
    source = open_shards(str(folder), seed=4)
    assert source.rows == 90 and source.grid == (4, 4) and source.text_length == 20 and source.text_prefix == 1
    epochs = [numbers(source.fetch(torch.arange(e * 90, (e + 1) * 90)), text) for e in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(90))
    assert len({tuple(e) for e in epochs}) == 3
    near = sum(abs(a - b) <= 3 for a, b in zip(epochs[0], epochs[0][1:], strict=False))
    assert near < 30  # rows of several shards are mixed


def test_a_sample_depends_on_its_index_alone(folder, text):
    whole = open_shards(str(folder), seed=4).fetch(torch.arange(200))
    fresh = open_shards(str(folder), seed=4)  # a resumed process: no state, first index far inside
    for index in ([150], [199, 3], [90, 91, 92, 0], list(range(120, 140))):
        rows = fresh.fetch(torch.tensor(index))
        for field in ("codes", "captions", "questions", "answer_start"):
            assert torch.equal(getattr(rows, field), getattr(whole, field)[index])
    other = open_shards(str(folder), seed=5).fetch(torch.arange(200))
    assert not torch.equal(other.captions, whole.captions)
    assert torch.equal(fresh.seeded(5).fetch(torch.arange(200)).captions, other.captions)


def test_questions_belong_to_their_row(folder, text):
    source = open_shards(str(folder))
    rows = source.fetch(torch.arange(90))
    assert source.has_questions
    for number, question, start, caption in zip(
        numbers(rows, text), rows.questions, rows.answer_start.tolist(), rows.captions, strict=True
    ):
        if number % 4:
            assert question[0] == text.special("question") and question[start - 1] == text.special("answer")
            assert text.decode(question[start:]) == str(number)
        else:
            assert torch.equal(question, caption) and start == source.text_prefix


def test_without_questions(tmp_path, text):
    write_samples(tmp_path / "raw", 5, change=lambda n, m: {k: v for k, v in m.items() if k != "json"})
    encode_shards(str(tmp_path / "raw"), MeanColourTokenizer(), text, tmp_path / "t", SETTINGS)
    source = open_shards(str(tmp_path / "t"))
    assert not source.has_questions
    rows = source.fetch(torch.arange(5))
    assert rows.questions is None and rows.answer_start is None
    rest, held = source.split(2)
    assert not held.has_questions and rest.rows == 3


@pytest.mark.parametrize("count", [1, 7, 20])
def test_holding_out(folder, text, count):
    rest, held = open_shards(str(folder), seed=2).split(count)
    assert rest.rows == 90 - count and held.rows == count
    kept = numbers(rest.fetch(torch.arange(3 * rest.rows)), text)
    assert Counter(kept) == dict.fromkeys(range(90 - count), 3)
    assert sorted(numbers(held.fetch(torch.arange(count)), text)) == list(range(90 - count, 90))
    with pytest.raises(ValueError, match="fewer validation rows"):
        rest.split(rest.rows)


def test_weighted_sets(folder, tmp_path, text):
    write_samples(tmp_path / "raw", 10, change=lambda n, m: m | {"txt": b"caption 500"})
    encode_shards(str(tmp_path / "raw"), MeanColourTokenizer(), text, tmp_path / "b", SETTINGS)
    source = open_shards(f"{folder}@3 :: {tmp_path / 'b'}@1")
    drawn = Counter(n == 500 for n in numbers(source.fetch(torch.arange(1000)), text))
    assert drawn == {False: 750, True: 250}
    again = open_shards(f"{folder}@3::{tmp_path / 'b'}@1").fetch(torch.tensor([997, 5]))
    assert torch.equal(again.captions, source.fetch(torch.tensor([997, 5])).captions)
    rest, held = source.split(8)
    assert Counter(n == 500 for n in numbers(held.fetch(torch.arange(8)), text)) == {False: 6, True: 2}
    assert rest.rows == 92
    encode_shards(str(tmp_path / "raw"), MeanColourTokenizer(), text, tmp_path / "c", EncodeSettings(24, 20))
    with pytest.raises(ValueError, match="differ in vocabulary, grid or text length"):
        open_shards(f"{folder}@1::{tmp_path / 'c'}@1")


def test_lost_rows_are_reported_and_replaced(tmp_path, text, caplog):
    write_samples(tmp_path / "raw", 28, 30)
    encode_shards(str(tmp_path / "raw"), MeanColourTokenizer(), text, tmp_path / "t", SETTINGS)
    before = open_shards(str(tmp_path / "t"))
    whole = numbers(before.fetch(torch.arange(28)), text)
    cut = tmp_path / "t" / "00001.tar"  # rows 7-13
    truncate(cut, cut.stat().st_size // 2)
    (tmp_path / "t" / "00002.tar").unlink()  # rows 14-20
    source = open_shards(str(tmp_path / "t"))
    with caplog.at_level(logging.WARNING):
        found = numbers(source.fetch(torch.arange(28)), text)
        source.fetch(torch.arange(28, 84))
    assert source.report.counts == {report.TRUNCATED_SHARD: 1, report.MISSING_SHARD: 1}
    assert "other rows take its place" in caplog.text
    left = set(range(28)) - set(found)
    assert set(range(14, 21)) <= left <= set(range(7, 21))
    for was, now in zip(whole, found, strict=True):
        assert was == now or was in left
    for url in (tmp_path / "t").glob("*.tar"):
        url.unlink()
    with pytest.raises(ValueError, match="none of 4 token shards can be read"):
        open_shards(str(tmp_path / "t")).fetch(torch.arange(2))


def test_held_out_rows_never_replace_lost_ones(tmp_path, text):
    write_samples(tmp_path / "raw", 28, 30)
    encode_shards(str(tmp_path / "raw"), MeanColourTokenizer(), text, tmp_path / "t", SETTINGS)
    rest, _ = open_shards(str(tmp_path / "t")).split(9)
    (tmp_path / "t" / "00001.tar").unlink()
    seen = set(numbers(rest.fetch(torch.arange(19 * 4)), text))
    assert seen == set(range(19)) - set(range(7, 14))


def test_raw_shards_are_encoded_once(tmp_path, text):
    write_samples(tmp_path / "raw", 12, 5)
    raw = str(tmp_path / "raw")
    image = MeanColourTokenizer()
    assert not is_tokenised(raw)
    source = open_shards(raw, 0, tmp_path / "cache", image, text, SETTINGS)
    assert is_tokenised(str(tmp_path / "cache" / "set0"))
    written = (tmp_path / "cache" / "set0" / "00000.tar").stat().st_mtime_ns
    again = open_shards(raw, 0, tmp_path / "cache", image, text, SETTINGS)
    assert (tmp_path / "cache" / "set0" / "00000.tar").stat().st_mtime_ns == written
    assert torch.equal(source.fetch(torch.arange(12)).codes, again.fetch(torch.arange(12)).codes)
    with pytest.raises(ValueError, match=r"name tokenizer\.image and tokenizer\.text"):
        open_shards(raw)


def test_refused_sources(folder, tmp_path):
    for source in (
        f"pipe:touch {tmp_path}/ran",
        f"pipe:touch {tmp_path}/ran;/",
        f"{folder}@1::pipe:touch {tmp_path}/ran@2",
    ):
        with pytest.raises(ValueError, match="shell command"):
            open_shards(source)
    assert not list(tmp_path.iterdir())
    (tmp_path / "00000.tar").write_bytes((folder / "00000.tar").read_bytes())
    (tmp_path / "tokens.json").write_bytes((folder / "tokens.json").read_bytes())
    (tmp_path / "extra.tar").write_bytes((folder / "00000.tar").read_bytes())
    with pytest.raises(ValueError, match=r"not listed in its folder's tokens\.json"):
        open_shards(str(tmp_path / "extra.tar"))
    assert open_shards(str(tmp_path / "00000.tar")).rows == 7


def test_training_settings_open_shards(folder, text):
    config = read_config(None, [f"data.train={folder}", "data.validation_rows=10", "seed=3"])
    train, held_out = open_sources(config)
    assert train.rows == 80 and held_out.rows == 10
    assert train.vocabulary == held_out.vocabulary
    assert train.vocabulary.specials["caption"] == text.special("caption")
    with pytest.raises(ValueError, match="which token shards do not have"):
        open_sources(read_config(None, [f"data.train={folder}", "data.validation_rows=0", "data.curriculum=[[0,1]]"]))


@pytest.mark.training
def test_shards_of_their_own_validate_a_run(folder, tmp_path):
    data = [f"data.train={folder}", f"data.validation={folder}", "data.validation_rows=200"]
    with pytest.raises(ValueError, match="is trained on, too"):
        open_sources(tiny_config(tmp_path, *data))
    with pytest.raises(ValueError, match="is trained on, too"):
        open_sources(tiny_config(tmp_path, f"data.train=raw@2::{folder}@1", *data[1:]))
    copied = shutil.copytree(folder, tmp_path / "copied")
    some, others = f"{folder}/{{00000..00009}}.tar", f"{folder}/{{00010..00012}}.tar"
    for train, validation in ((folder, copied), (folder, f"{folder}/00003.tar"), (f"{others}@2::{copied}@1", others)):
        with pytest.raises(ValueError, match=r"is trained on, too \("):
            open_sources(tiny_config(tmp_path, f"data.train={train}", f"data.validation={validation}"))
    data = [f"data.train={some}", f"data.validation={others}", data[2]]
    config = tiny_config(tmp_path, *data, "steps=1", "batch_size=2", "logging.validation_draws=1")
    train, held_out = open_sources(config)
    assert held_out.rows == 20  # fewer than asked for
    assert Trainer(config, train, held_out).train()["joint_nelbo"] > 0


@pytest.mark.training
def test_raw_shards_and_tables_under_another_name_are_not_held_out(folder, text, tmp_path):
    write_samples(tmp_path / "raw", 12, 4)
    for name in ("a", "b"):
        shutil.copytree(tmp_path / "raw", tmp_path / name)
    (tmp_path / "b" / "00000.tar").unlink()
    for name in ("a", "b"):  # b holds shards of a, encoded into other token shards
        encode_shards(str(tmp_path / name), MeanColourTokenizer(), text, tmp_path / f"{name}_tokens", SETTINGS)
    sets = [f"data.train={tmp_path / 'a_tokens'}", f"data.validation={tmp_path / 'b_tokens'}"]
    with pytest.raises(ValueError, match="the same content under another name"):
        open_sources(tiny_config(tmp_path, *sets))
    for name in ("x", "y"):
        tiny_table(12).save(tmp_path / f"{name}.safetensors")
    tables = [f"data.train={tmp_path / 'x.safetensors'}", f"data.validation={tmp_path / 'y.safetensors'}"]
    with pytest.raises(ValueError, match="the same content under another name"):
        open_sources(tiny_config(tmp_path, *tables))


def test_data_that_do_not_exist_are_named_before_tokenizers_are_asked_for(tmp_path):
    (tmp_path / "photos").mkdir()
    for name, said in ((f"{tmp_path}/gone", "does not exist"), (f"{tmp_path}/photos", "holds no .tar shards")):
        with pytest.raises((FileNotFoundError, ValueError), match=said):
            open_shards(name)


def test_token_shards_whose_encoding_was_stopped_are_named(folder, text, tmp_path):
    unfinished = shutil.copytree(folder, tmp_path / "tokens")
    (unfinished / "tokens.json").unlink()
    (unfinished / "progress.json").write_text("{}")
    with pytest.raises(ValueError, match=r"is not finished; run `unidiff encode` again"):
        open_shards(str(unfinished), cache=tmp_path / "x", image_tokenizer=MeanColourTokenizer(), text_tokenizer=text)


def test_a_folder_of_token_shards_that_lists_none_is_named(folder, text, tmp_path):
    empty = shutil.copytree(folder, tmp_path / "tokens")
    manifest = json.loads((empty / "tokens.json").read_text())
    (empty / "tokens.json").write_text(json.dumps({**manifest, "shards": {}}))
    with pytest.raises(ValueError, match="holds no rows"):
        open_shards(str(empty), cache=tmp_path / "x", image_tokenizer=MeanColourTokenizer(), text_tokenizer=text)
