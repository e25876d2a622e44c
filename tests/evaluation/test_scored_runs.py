"""What `unidiff eval run` writes is what `unidiff eval score` reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tiny_pipeline import tiny_pipeline

from unidiff.cli.app import recipe
from unidiff.evaluation.results.base import finished_rows
from unidiff.evaluation.results.captions import read_captions
from unidiff.evaluation.results.pictures import PictureSet
from unidiff.evaluation.scoring import score_results
from unidiff.evaluation.suites.base import SUITES, run_benchmark
from unidiff.pipelines.batch import MANIFEST


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny_pipeline(text_length=96)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    for number in (7, 9):
        Image.new("RGB", (40, 30), (9 * number, 0, 0)).save(folder / f"COCO_val2014_{number:012d}.jpg")
    return folder


def run(name: str, pipe: Any, place: Path, out: Path, prompts: Any) -> Path:
    lines = isinstance(prompts, list)
    path = out.parent / f"{name}_questions.json"
    path.write_text("\n".join(map(json.dumps, prompts)) if lines else json.dumps(prompts))
    assert (
        run_benchmark(SUITES[name], pipe, path, out, place if SUITES[name].needs_pictures else None, steps=2)
        is not None
    )
    return path


def words_of(out: Path) -> list[str]:
    return [row["words"] for row in finished_rows(out) or ()]


def test_captions(pipe, place, tmp_path):
    pytest.importorskip("sacrebleu")
    images = [{"id": number, "file_name": f"COCO_val2014_{number:012d}.jpg"} for number in (7, 9)]
    notes = [{"image_id": number, "caption": "a dog"} for number in (7, 9)]
    path = run("coco-captions", pipe, place, tmp_path / "o", {"images": images, "annotations": notes})
    truth = {**json.loads(path.read_text()), "annotations": [
        {"image_id": number, "caption": words} for number, words in zip((7, 9), words_of(tmp_path / "o"), strict=True)
    ]}  # fmt: skip
    (tmp_path / "own.json").write_text(json.dumps(truth))  # its own captions are the references
    assert score_results("bleu", tmp_path / "o", tmp_path / "own.json", resamples=20).values["bleu1"] == pytest.approx(
        100
    )
    assert (
        read_captions(tmp_path / "o" / "rows").of_picture("COCO_val2014_000000000007.jpg")
        == words_of(tmp_path / "o")[:1]
    )


def test_answers(pipe, place, tmp_path):
    asked = [{"question_id": 70 + n, "image_id": n, "question": "two cats?"} for n in (7, 9)]
    run("vqav2", pipe, place, tmp_path / "v", {"data_subtype": "val2014", "questions": asked})
    people = [[{"answer": words, "answer_id": n} for n in range(10)] for words in words_of(tmp_path / "v")]
    notes = [{"question_id": 77, "answers": people[0]}, {"question_id": 79, "answers": people[1]}]
    (tmp_path / "notes.json").write_text(json.dumps({"annotations": notes}))
    assert score_results("vqa", tmp_path / "v", tmp_path / "notes.json").values["vqa_accuracy"] == 1

    pope = [
        {"question_id": n, "image": f"COCO_val2014_{n:012d}.jpg", "text": f"a dog {n}?", "label": "yes"} for n in (7, 9)
    ]
    path = run("pope", pipe, place, tmp_path / "p", pope)
    assert score_results("pope", tmp_path / "p", path, resamples=20).intervals["pope_accuracy"].n == 2

    choice = {
        "question": "<image 1> a?",
        "options": ["a dog", "two"],
        "answer": "B",
        "question_type": "multiple-choice",
    }
    rows = [{"id": f"validation_Art_{n}", "image": f"COCO_val2014_{n:012d}.jpg", **choice} for n in (7, 9)]
    run("mmmu", pipe, place, tmp_path / "m", rows)
    assert 0 <= score_results("mmmu", tmp_path / "m").values["mmmu_category.Art"] <= 1


def test_pictures(pipe, place, tmp_path):
    pytest.importorskip("torch_fidelity")
    prompts = [
        {"prompt": prompt, "vqa_list": [["is it?", "yes"]]} for prompt in ("a dog", "two cats", "an owl", "a fox")
    ]
    run("geneval2", pipe, place, tmp_path / "g", prompts)
    shown = PictureSet.of(tmp_path / "g", "made")
    assert shown.names == [f"{n:06d}.png" for n in range(4)]  # once each, though they lie in two folders
    assert read_captions(tmp_path / "g").of_picture("000001.png") == ["two cats"]
    network = lambda pictures: pictures.mean((2, 3))  # noqa: E731
    assert score_results("kid", tmp_path / "g", tmp_path / "g" / "scorer", network).about["made_pictures"]["count"] == 4
    manifest = tmp_path / "g" / "rows" / MANIFEST
    manifest.write_text("\n".join(manifest.read_text().splitlines()[:-1]) + "\n")
    with pytest.raises(ValueError, match="has 3 of 4 rows; finish the run first"):
        PictureSet.of(tmp_path / "g", "made")


def test_the_command(place, tmp_path, capsys):
    pytest.importorskip("torch_fidelity")
    for folder in ("one", "other"):
        (tmp_path / folder).mkdir()
        for number in range(4):
            Image.new("RGB", (64, 64), (60 * number, 0, 0)).save(tmp_path / folder / f"{number}.png")
    words = ["eval", "score", "fid", str(tmp_path / "one"), "--network", "emoji", "--device", "cpu"]
    assert recipe(*words, "--against", str(tmp_path / "other"), "--json", str(tmp_path / "fid.json"), "--outcomes") == 0
    said = capsys.readouterr()
    assert "95 % interval" in said.out and "4 and 4 pictures for 76 features" in said.err
    assert json.loads((tmp_path / "fid.json").read_text())["fid"] == pytest.approx(0, abs=1e-6)
    assert recipe(*words) == 2 and "needs a folder of real pictures (--against)" in capsys.readouterr().err
    assert recipe(*words, "--outcomes") == 2 and "--outcomes goes with --json" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["a[/b]", "a[red]b", "a:fox:b"])
def test_names_are_printed_as_they_are(name, tmp_path, capsys, monkeypatch):
    pytest.importorskip("pycocoevalcap")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir(parents=True)
    for path in (f"{name}/made.json", "against.json"):
        Path(path).write_text(json.dumps({"1": "a fox on a red background", "2": "two owls"}))
    for way in ("one", "other"):
        words = ["eval", "score", "cider", f"{name}/made.json", "--against", "against.json", "--device", "cpu"]
        assert recipe(*words, "--json", f"{name}/{way}.json", "--outcomes") == 0
        assert f"cider of {name}" in capsys.readouterr().out
    assert recipe("eval", "compare", f"{name}/one.json", f"{name}/other.json") == 0
    assert f"{name}/other.json - {name}" in capsys.readouterr().out


def test_fid_of_a_world_is_a_task(tmp_path):
    pytest.importorskip("torch_fidelity")
    from unidiff import UniDiffPipeline
    from unidiff.world import WORLDS

    pipe = UniDiffPipeline.from_pretrained("emoji")
    report = WORLDS["emoji"].evaluate(pipe, 0, 4, tasks=("fid", "kid"), steps=2)
    assert report.values["fid"] > 0 and report.intervals["kid"].n == 4
