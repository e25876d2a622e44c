"""Pictures and captions as people have them, to shards; and what shards hold."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unidiff.data.collect import NOTE, ShardSettings, fitted, make_shards, noted
from unidiff.data.report import SkipReport
from unidiff.data.shards import ShardSource
from unidiff.tokens.text import TextTokenizer
from unidiff.train.data.check import check_shards

COLOURS = ("red", "green", "blue", "yellow", "black", "navy")


def pictures(folder: Path) -> Path:
    """Six flat pictures with captions, 24 wide and 12 high, one transparent at the left."""
    (folder / "more").mkdir(parents=True)
    for number, colour in enumerate(COLOURS):
        image = Image.new("RGBA", (24, 12), colour)
        if colour == "red":
            image.paste((0, 0, 0, 0), (0, 0, 12, 12))
        place = folder / ("more" if number > 3 else "") / f"{number}.png"
        image.save(place)
        place.with_suffix(".txt").write_text(f"a {colour} field\nein Feld\n")
    return folder


def samples(out: Path) -> dict[str, dict]:
    found = list(ShardSource(str(out), optional=("json",)))
    return {sample["json"]["source"]: sample for sample in found}


def test_a_folder_of_pictures_with_captions(tmp_path):
    folder = pictures(tmp_path / "mine")
    Image.new("RGB", (9, 9)).save(folder / "alone.png")
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n no picture")
    (folder / "broken.txt").write_text("broken")
    (folder / "wordless.png").write_bytes((folder / "1.png").read_bytes())
    (folder / "wordless.txt").write_text(" \n")
    (folder / "drawing.svg").write_text("<svg/>")
    told = []
    settings = ShardSettings(size=(8, 8), background="lime", first_line=True, samples_per_shard=4)
    note = make_shards(folder, tmp_path / "raw", settings, lambda *n: told.append(n))
    assert note.samples == 6 and note.shards == {"00000.tar": 4, "00001.tar": 2} and told == [(9, 9)]
    skipped = SkipReport.from_state_dict(note.skipped)
    assert skipped.counts == {"missing_member": 1, "corrupt_image": 1, "empty_caption": 1}
    assert skipped.ignored == {"svg": 1} and "alone.png" in skipped.summary() and "alone.txt" in skipped.summary()
    found = samples(tmp_path / "raw")
    assert found["more/4.png"]["txt"] == "a black field" and found["0.png"]["image"].shape == (3, 8, 8)
    red = found["0.png"]["image"]
    assert red[:, 4, 0].tolist() == [0, 255, 0] and red[:, 4, 7].tolist() == [255, 0, 0]
    assert [*found] != sorted(found)  # mixed: the last ones are held out
    assert noted([str(tmp_path / "raw" / name) for name in note.shards]).size == (8, 8)
    with pytest.raises(ValueError, match="holds shards already"):
        make_shards(folder, tmp_path / "raw", settings)


def test_pictures_are_cut_padded_or_stretched():
    image = Image.new("RGB", (20, 10), "red")
    image.paste("blue", (0, 0, 5, 10))
    image.paste("blue", (15, 0, 20, 10))
    cut, padded, stretched = (
        np.asarray(fitted(image, ShardSettings(size=(10, 10), fit=fit, background="white")))
        for fit in ("crop", "pad", "stretch")
    )
    assert (cut[5, 5] == (255, 0, 0)).all() and (cut[:, 2] == (255, 0, 0)).all()
    assert (padded[0] == 255).all() and (padded[-1] == 255).all() and (padded[5, 0] == (0, 0, 255)).all()
    assert (stretched[5, 0] == (0, 0, 255)).all() and (stretched[5, 5] == (255, 0, 0)).all()
    thin = Image.new("RGB", (10_000, 1))
    assert all(fitted(thin, ShardSettings(size=(8, 16), fit=fit)).size == (16, 8) for fit in ("crop", "pad", "stretch"))


def test_pictures_are_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    (tmp_path / "mine").mkdir()
    image = Image.new("RGB", (40, 20), "white")
    image.paste("black", (0, 0, 20, 20))
    image.save(tmp_path / "mine" / "a.jpg", exif=exif)
    (tmp_path / "mine" / "a.txt").write_text("half")
    make_shards(tmp_path / "mine", tmp_path / "raw", ShardSettings())
    turned = samples(tmp_path / "raw")["a.jpg"]["image"]
    assert turned.shape == (3, 40, 20) and turned[:, :15].max() < 40 and turned[:, 25:].min() > 215


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet", "imagefolder", "bytes"])
def test_tables_of_pictures(tmp_path, kind):
    folder = pictures(tmp_path / "mine")
    rows = [
        {"file_name": f"{'more/' * (n > 3)}{n}.png", "caption": f"a {c} field", "nothing": "x"}
        for n, c in enumerate(COLOURS)
    ]
    rows.append({"file_name": "gone.png", "caption": "gone", "nothing": ""})
    source = folder / f"table.{kind}"
    if kind in ("csv", "tsv"):
        with open(source, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if kind == "tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    elif kind in ("jsonl", "imagefolder"):
        source = folder / "metadata.jsonl" if kind == "imagefolder" else source
        rows[0]["qa"] = [["what is it?", "a field"]]
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
        source = folder if kind == "imagefolder" else source
    else:
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        if kind == "bytes":  # as Hugging Face's datasets are stored
            contents = [(folder / row["file_name"]).read_bytes() if row["caption"] != "gone" else None for row in rows]
            rows = [
                {"image": {"bytes": data, "path": row["file_name"]}, "text": row["caption"]}
                for row, data in zip(rows, contents, strict=True)
            ]
        source = folder / "train.parquet"
        parquet.write_table(pyarrow.Table.from_pylist(rows), source)
    note = make_shards(source, tmp_path / "raw", ShardSettings(size=(12, 24)))
    assert note.samples == 6 and SkipReport.from_state_dict(note.skipped).counts == {"missing_member": 1}
    found = {sample["txt"]: sample for sample in samples(tmp_path / "raw").values()}
    assert set(found) == {f"a {colour} field" for colour in COLOURS}
    assert found["a blue field"]["image"][:, 6, 6].tolist() == [0, 0, 255]
    if kind in ("jsonl", "imagefolder"):
        assert found["a red field"]["json"]["qa"] == [["what is it?", "a field"]]


def test_sources_that_cannot_be_read_are_one_sentence(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.csv").write_text("one,two\n1,2\n")
    (tmp_path / "a.jsonl").write_text("[1]\n")
    (tmp_path / "a.zip").write_bytes(b"")
    cases = [
        ("gone", {}, "does not exist"), ("empty", {}, "holds no pictures"), ("a.zip", {}, "is no table"),
        ("a.csv", {}, "no column 'image' of pictures; it has one, two"), ("a.jsonl", {}, "no mapping"),
        ("a.csv", {"picture_column": "one"}, "no column 'caption'"),
    ]  # fmt: skip
    for name, options, message in cases:
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            make_shards(tmp_path / name, tmp_path / "raw", ShardSettings(**options))
    with pytest.raises(ValueError, match="background is 'reddish'"):
        ShardSettings(background="reddish")
    assert not (tmp_path / "raw" / NOTE).exists()


def test_what_shards_hold(tmp_path):
    make_shards(pictures(tmp_path / "mine"), tmp_path / "raw", ShardSettings(first_line=True))
    texts = TextTokenizer.train(["a red field", "a green field"] * 20, 300)
    texts.known_words = {"a", "red", "green", "field"}
    found = check_shards(str(tmp_path / "raw"), texts)
    assert found.sizes == {(12, 24): 6} and found.words == [3] * 6 and len(found.shown) == 6
    assert dict(found.unknown) == {"blue": 1, "yellow": 1, "black": 1, "navy": 1}
    said = "\n".join(found.lines())
    assert "6 in 1 shards" in said and "24 x 12: 6" in said and "blue (1)" in said
    assert min(found.sheet().size) > 100
    assert len(check_shards(str(tmp_path / "raw"), most=2).words) == 2


def test_the_commands(run, tmp_path):
    folder = pictures(tmp_path / "mine")
    status, said, err = run("shards", folder, tmp_path / "raw", "--size", "16x8", "--fit", "pad")
    assert status == 0 and "6 samples in 1 shards" in said, err
    status, said, _ = run("data", "check", tmp_path / "raw", "--sheet", tmp_path / "sheet.png")
    assert status == 0 and "16 x 8: 6" in said and Image.open(tmp_path / "sheet.png")
    for words in (["--fit", "squash"], ["--size", "0"], ["--format", "tiff"]):
        status, _, err = run("shards", folder, tmp_path / "other", *words)
        assert status == 1 and err.count("\n") == 1, err
