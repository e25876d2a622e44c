"""`unidiff fashion`: classifiers, neighbours, numbers of a tiny model, and the whole way from files to numbers."""

from __future__ import annotations

import json
import math
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from doc_code import blocks
from fashion_files import tiny_files
from PIL import Image
from tiny_pipeline import tiny_pipeline

from unidiff.evaluation.report import EvaluationReport
from unidiff.recipes.fashion.attributes import Thresholds
from unidiff.recipes.fashion.captions import understood
from unidiff.recipes.fashion.classifiers import ConvClassifier, LinearClassifier, in_parts, trained
from unidiff.recipes.fashion.measure import NEIGHBOURS, PARTS, SHEET
from unidiff.recipes.fashion.neighbours import nearest
from unidiff.recipes.fashion.photographs import load

SHAPE = (16, 24)


def test_nearest_is_the_least_of_all_distances():
    generator = torch.Generator().manual_seed(0)
    training, pictures = torch.rand(40, 5, 6, generator=generator), torch.rand(300, 5, 6, generator=generator)
    pictures[7] = training[11]
    found = nearest(pictures, training)
    every = (pictures[:, None] - training).square().mean((2, 3)).sqrt()  # [N, M]
    assert torch.equal(found.place, every.argmin(1)) and torch.allclose(found.distance, every.min(1).values)
    assert found.place[7] == 11 and found.distance[7] == 0


@pytest.mark.parametrize("kind", [LinearClassifier, ConvClassifier])
def test_a_classifier_learns_and_is_kept(tmp_path: Path, kind):
    tiny_files(tmp_path, 200, 100)
    training, test = load(tmp_path, "train"), load(tmp_path, "test")
    pictures, labels = torch.from_numpy(training.pixels).float() / 255, torch.from_numpy(training.labels)
    first = trained(kind, pictures, labels, 60, folder=tmp_path)
    seen = torch.from_numpy(test.pixels).float() / 255
    right = (in_parts(first, seen).argmax(1).numpy() == test.labels).mean()
    assert right > 0.9
    (file,) = tmp_path.glob(f"{kind.__name__}-*.safetensors")
    before = file.stat().st_mtime_ns
    again = trained(kind, pictures, labels, 60, folder=tmp_path)
    assert file.stat().st_mtime_ns == before and torch.equal(again(seen), first(seen))
    fresh = trained(kind, pictures, labels, 60)  # nothing kept: the same weights
    assert torch.equal(fresh(seen), first(seen))
    trained(kind, pictures, labels, 60, seed=1, folder=tmp_path)
    assert len(list(tmp_path.glob(f"{kind.__name__}-*.safetensors"))) == 2
    file.write_bytes(b"damaged")
    with pytest.raises(ValueError, match=file.name):
        trained(kind, pictures, labels, 60, folder=tmp_path)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """IDX files, the test folder, and a pipeline with random weights."""
    from unidiff.recipes.fashion.folder import write_folder

    folder = tmp_path_factory.mktemp("fashion")
    tiny_files(folder, 60, 20, SHAPE)
    write_folder(folder, "test", folder / "test")
    corpus = (folder / "test" / "prompts.txt").read_text().splitlines()
    tiny_pipeline(text_length=48, corpus=corpus * 3).save_pretrained(folder / "model")
    return folder


QUICK = ["--classifier-steps", "20", "--device", "cpu"]


def test_numbers_of_a_model(prepared: Path, run, tmp_path: Path):
    pytest.importorskip("torch_fidelity")
    model, test = str(prepared / "model"), prepared / "test"
    for name, prompts in (("drawn", "prompts.txt"), ("said", "pictures.jsonl")):
        status, _, err = run(
            "generate", "--prompts", test / prompts, "--out", tmp_path / name, "--model", model, "--steps", "2"
        )
        assert status == 0, err
    command = ["fashion", "measure", model, "--source", prepared, "--drawn", tmp_path / "drawn"]
    command += ["--said", tmp_path / "said", "--out", tmp_path / "out", *QUICK]
    status, table, err = run(*command)
    assert status == 0, err
    report = EvaluationReport.load(tmp_path / "out" / "report.json")
    values = report.values
    assert {key.split(".")[0] for key in values} == set(PARTS)
    assert values["tokenizer.codes"] == 6 and values["tokenizer.bits_per_pixel"] == pytest.approx(6 * 4 / 384)
    bits = values["likelihood.image_nelbo"] / math.log(2) / 384
    assert values["likelihood.image_bits_per_pixel"] == pytest.approx(bits)
    parts = values["likelihood.joint_nelbo_text"] + values["likelihood.joint_nelbo_image"]
    assert values["likelihood.joint_nelbo"] == pytest.approx(parts)

    shown = load(prepared, "test")
    rows = [json.loads(line) for line in (tmp_path / "said" / "manifest.jsonl").read_text().splitlines()][1:]
    said = {int(row["arguments"]["image"][:6]): understood(row["words"]) for row in rows}
    right = [said[n] is not None and said[n].label == label for n, label in enumerate(shown.labels)]
    assert values["captions.class"] == pytest.approx(np.mean(right))
    drawn = np.stack([np.asarray(Image.open(tmp_path / "drawn" / f"{n:06d}.png").convert("L")) for n in range(20)])
    asked = [understood(line) for line in (test / "prompts.txt").read_text().splitlines()]
    levels = Thresholds.of(load(prepared, "train")).levels(drawn / 255, np.array([own.label for own in asked]))
    words = [
        word == true for own, row in zip(asked, levels, strict=True) for word, true in zip(own.levels, row) if word
    ]
    assert report.intervals["pictures.attributes"].n == len(words)
    assert values["pictures.attributes"] == pytest.approx(np.mean(words), abs=0.1)  # PNG's grey is rounded otherwise
    assert values["copies.test.mean"] > 0 and report.intervals["copies.drawn.mean"].n == 20
    assert Image.open(tmp_path / "out" / SHEET).width > 200 and Image.open(tmp_path / "out" / NEIGHBOURS).width > 200

    before = (tmp_path / "out" / "report.json").read_bytes()
    assert run(*command)[0] == 0 and (tmp_path / "out" / "report.json").read_bytes() == before
    assert "bits_per_pixel" in table


def test_what_is_wrong_is_one_sentence(prepared: Path, run, tmp_path: Path):
    command = ["fashion", "measure", prepared / "model", "--out", tmp_path / "out", *QUICK]

    def refused(*words, out: str = "out") -> str:
        command[4] = tmp_path / out
        status, _, err = run(*command, *words)
        assert status == 1 and "Traceback" not in err
        return err

    assert "dataset-fashion-mnist" in refused("--source", tmp_path)
    source = ["--source", prepared]
    assert "expected some of classifiers, tokenizer" in refused(*source, "--part", "likelyhood")
    assert "unidiff generate --prompts prompts.txt" in refused(*source, "--part", "pictures")
    assert "unidiff generate --prompts pictures.jsonl" in refused(*source, "--part", "captions", "--said", prepared)
    square = tmp_path / "square"
    square.mkdir()
    tiny_files(square, 20, 10)
    assert "28 x 28 and the model draws 24 x 16" in refused("--source", square, "--part", "tokenizer", out="other")
    status, _, err = run("fashion", "pictures", tmp_path / "p", "--source", square, "--split", "valid")
    assert status == 1 and "expected train or test" in err and not (tmp_path / "p").exists()


TINY = {
    "fashion pictures": "--source .",
    "tokenizer image": "steps=20 validate_every=20 model.encoder_width=32 model.decoder_widths=[32,16] "
    "model.decoder_depths=[1,1] model.codebook_size=32 device=cpu threads=1",
    "train fashion": "steps=4 batch_size=4 model.hidden_size=32 model.num_layers=1 model.num_heads=2 model.ffn_size=64 "
    "logging.sweep_rows=0 logging.trackers=[] data.validation_rows=8 device=cpu threads=1",
    "generate --prompts": "--steps 2",
    "fashion measure": f"--source . {' '.join(QUICK)}",
}
"""What makes the commands of the page small."""


@pytest.mark.slow
def test_the_whole_way_of_the_page(tmp_path: Path, monkeypatch, run):
    """Every command of docs/photographs.md, the last one as a process, on tiny files."""
    pytest.importorskip("torch_fidelity")
    tiny_files(tmp_path, 96, 20)
    monkeypatch.chdir(tmp_path)
    lines = [shlex.split(line) for block in blocks("photographs.md", "bash") for line in block.text.splitlines()]
    assert len(lines) > 10 and all(program == "unidiff" for program, *_ in lines)
    commands = [[*words, *shlex.split(TINY.get(" ".join(words[:2]), ""))] for _, *words in lines]
    for words in commands[:-1]:
        status, _, err = run(*words)
        assert status == 0, f"{words}: {err}"
    last = [sys.executable, "-m", "unidiff", *commands[-1]]
    done = subprocess.run(last, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    values = EvaluationReport.load(tmp_path / "runs" / "fashion_measured" / "report.json").values
    assert {key.split(".")[0] for key in values} == set(PARTS)
