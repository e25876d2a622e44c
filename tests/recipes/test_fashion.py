"""Fashion-MNIST: files read, words that follow from pixels, and the way from files to numbers on tiny ones."""

from __future__ import annotations

import gzip
import json
import random
import struct
from pathlib import Path

import numpy as np
import pytest
from fashion_files import idx, tiny_files
from PIL import Image

from unidiff.recipes.fashion.attributes import ATTRIBUTES, Thresholds, measures
from unidiff.recipes.fashion.captions import ADJECTIVES, NOUNS, Statement, caption, understood
from unidiff.recipes.fashion.folder import PROMPTS, ROWS, TABLE, captions_of, write_folder
from unidiff.recipes.fashion.photographs import CLASSES, Photographs, load, read_idx


@pytest.mark.parametrize("packed", [False, True])
def test_idx_files_are_read_plain_and_packed(tmp_path: Path, packed: bool):
    values = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    path = tmp_path / "values"
    path.write_bytes(gzip.compress(idx(values)) if packed else idx(values))
    assert np.array_equal(read_idx(path), values)


GOOD = idx(np.zeros((3, 4, 4), np.uint8))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "does not begin as one"),
        (b"\x89PNG\r\n", "does not begin as one"),
        (b"\0\0\x0d" + GOOD[3:], "does not begin as one"),
        (GOOD[:9], "does not begin as one"),
        (GOOD[:-1], "says 48 values, and 47 bytes follow"),
        (GOOD + b"\0", "says 48 values, and 49 bytes follow"),
        (gzip.compress(GOOD)[:-9], "IDX file"),
        (struct.pack(">4B3I", 0, 0, 8, 3, *[2**32 - 1] * 3), "and 0 bytes follow"),
    ],
)
def test_a_damaged_file_gets_a_sentence(tmp_path: Path, data: bytes, words: str):
    path = tmp_path / "bad"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=words) as caught:
        read_idx(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_negatives_become_photographs(tmp_path: Path):
    tiny_files(tmp_path, train=20, test=10)
    raw = read_idx(tmp_path / "t10k-images-idx3-ubyte.gz")
    shown = load(tmp_path, "test")
    assert np.array_equal(shown.pixels, 255 - raw) and len(shown) == 10
    picture = shown.tensor(2, 3)
    assert picture.shape == (1, 3, 28, 28) and np.allclose(picture[0, 1].numpy(), shown.pixels[2] / 255)


def test_files_that_do_not_belong_together_are_refused(tmp_path: Path):
    tiny_files(tmp_path, train=20, test=10)
    labels = tmp_path / "t10k-labels-idx1-ubyte.gz"
    labels.write_bytes(idx(np.zeros(9, np.uint8)))
    with pytest.raises(ValueError, match=r"labels of shape \[9\] for the 10 pictures"):
        load(tmp_path, "test")
    labels.write_bytes(idx(np.full(10, 10, np.uint8)))
    with pytest.raises(ValueError, match="the label 10; expected 0 to 9"):
        load(tmp_path, "test")
    labels.unlink()
    with pytest.raises(FileNotFoundError, match=r"t10k-labels.*dataset-fashion-mnist"):
        load(tmp_path, "test")
    with pytest.raises(ValueError, match="the split is 'valid'; expected train or test"):
        load(tmp_path, "valid")


def test_measures_of_known_pictures():
    x = np.ones((4, 10, 10))
    x[0, 2:8, 4:6] = 0.2  # 6 rows of 2 pixels
    x[1, 4:6, 1:9] = 0.6  # 2 rows of 8
    x[2, 1:9, 1:9] = 0.2
    x[2, 1:9, 1:9:2] = 0.6  # stripes
    found = measures(x)
    assert found[:, 0] == pytest.approx([0.2, 0.6, 0.4, 1.0])
    assert found[:, 1] == pytest.approx([2, 8, 8, 0])
    assert found[0, 2] == found[1, 2] == found[3, 2] == 0  # outlines are no pattern
    assert found[2, 2] == pytest.approx(
        0.4 * 30 / 60
    )  # of 6 x 6 inner pixels, 30 pairs across change and 30 down do not


def test_thirds_of_the_training_photographs_decide_within_a_class():
    pixels = np.full((30, 28, 28), 255, np.uint8)
    labels = np.arange(30) % 10
    for number in range(30):
        pixels[number, 4:24, 4:24] = 20 * (number % 10) + 10 * (number // 10)  # classes overlap
    shown = Photographs(pixels, labels)
    levels = Thresholds.of(shown).levels(pixels / 255, labels)
    assert levels[:, 0].tolist() == [-1] * 10 + [0] * 10 + [1] * 10
    assert not levels[:, 1:].any()  # all as wide and as plain
    with pytest.raises(ValueError, match="show no ankle boot"):
        Thresholds.of(Photographs(pixels[:9], labels[:9]))


def test_captions_say_what_is_true_and_are_understood():
    rng, seen = random.Random(0), set()
    for label in range(len(CLASSES)):
        for _ in range(200):
            levels = [rng.choice((-1, 0, 1)) for _ in ATTRIBUTES]
            text = caption(label, levels, rng)
            said = understood(text)
            assert said is not None and said.label == label, text
            assert all(word in (0, level) for word, level in zip(said.levels, levels, strict=True)), text
            seen |= {
                word for words in (*NOUNS, *(w for pair in ADJECTIVES for w in pair)) for word in words if word in text
            }
    assert seen == {word for words in (*NOUNS, *(w for pair in ADJECTIVES for w in pair)) for word in words}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("A Dark SHIRT", Statement(6, (-1, 0, 0))),
        ("a t-shirt, slim and textured", Statement(0, (0, -1, 1))),
        ("a handbag", Statement(8, (0, 0, 0))),
        ("an open shoe that is pale", Statement(5, (1, 0, 0))),
        ("a shirt and a bag", None),
        ("a dark pale shirt", None),
        ("a widest thing", None),
        ("", None),
    ],
)
def test_sentences_are_understood(text: str, said: Statement | None):
    assert understood(text) == said


def test_a_folder_for_shards(tmp_path: Path):
    tiny_files(tmp_path, train=20, test=10)
    count = write_folder(tmp_path, "test", tmp_path / "out", captions_each=3)
    rows = [json.loads(line) for line in (tmp_path / "out" / TABLE).read_text().splitlines()]
    assert len(rows) == count and 10 < count <= 30
    assert {row["file_name"] for row in rows} == {f"{n:06d}.png" for n in range(10)}
    assert all(CLASSES[understood(row["caption"]).label] == row["class"] for row in rows)
    shown = load(tmp_path, "test")
    for number in range(10):
        assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / f"{number:06d}.png")), shown.pixels[number])
    assert (tmp_path / "out" / PROMPTS).read_text().splitlines() == [row["caption"] for row in rows]
    asked = [json.loads(line) for line in (tmp_path / "out" / ROWS).read_text().splitlines()]
    assert asked == [{"image": f"{n:06d}.png"} for n in range(10)]
    with pytest.raises(FileExistsError, match="is there already; name another folder"):
        write_folder(tmp_path, "test", tmp_path / "out")


def test_captions_depend_on_number_and_seed_alone(tmp_path: Path):
    tiny_files(tmp_path, train=20, test=10)
    shown, thresholds = load(tmp_path, "test"), Thresholds.of(load(tmp_path, "train"))
    first = captions_of(shown, thresholds, "test", 4)
    part = captions_of(Photographs(shown.pixels[:5], shown.labels[:5]), thresholds, "test", 4)
    assert first[:5] == part and first != captions_of(shown, thresholds, "test", 4, seed=1)
