"""Public benchmarks: what is written is read by the rules of each scorer, and a run that was stopped ends as one that was not."""

from __future__ import annotations

import base64
import csv
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tiny_pipeline import SIZE, tiny_pipeline

from unidiff.evaluation.benchmark.measure import model_hash
from unidiff.evaluation.scoring import score_results
from unidiff.evaluation.suites.base import RESULTS, SUITES, Suite, asked_rows, run_benchmark
from unidiff.pipelines.batch import MANIFEST, run_rows
from unidiff.pipelines.decode import row_seeds

HEIGHT, WIDTH = SIZE


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny_pipeline(text_length=96)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Small files in the layouts that the benchmarks publish, and pictures of several sizes."""
    folder = tmp_path_factory.mktemp("benchmarks")
    lines = lambda rows: "\n".join(map(json.dumps, rows)) + "\n"  # noqa: E731
    prompts = ["a dog", "two cats"]
    geneval = [{"tag": "counting", "include": [{"class": p, "count": 1}], "prompt": p} for p in prompts]
    (folder / "geneval").write_text(lines(geneval))
    (folder / "geneval2").write_text(lines([{"prompt": p, "vqa_list": [["is it?", "yes"]]} for p in prompts]))
    (folder / "dpg").mkdir()
    for name, prompt in zip(("stanford_2", "partiprompts_1"), prompts, strict=True):
        (folder / "dpg" / f"{name}.txt").write_text(prompt)
    (folder / "t2i-compbench").write_text("\n".join(prompts))
    (folder / "mjhq").write_text(
        json.dumps({f"n{i}": {"category": c, "prompt": p} for i, (c, p) in enumerate(zip(("art", "food"), prompts))})
    )
    names = ["COCO_val2014_000000000007.jpg", "COCO_val2014_000000000009.jpg"]
    (folder / "pictures").mkdir()
    for number, name in enumerate(names):
        Image.new("RGB", (40 + number, 30), (200, 10 * number, 0)).save(folder / "pictures" / name)
    images = [{"id": 9, "file_name": names[1]}, {"id": 7, "file_name": names[0]}]
    (folder / "coco-captions").write_text(json.dumps({"images": images, "annotations": []}))
    asked = [{"question_id": 70 + i, "image_id": 7 + 2 * i, "question": "two cats?"} for i in range(2)]
    (folder / "vqav2").write_text(json.dumps({"data_subtype": "val2014", "questions": asked}))
    pope = [{"question_id": i, "image": n, "text": f"a dog {i}?", "label": "yes"} for i, n in enumerate(names)]
    (folder / "pope").write_text(lines(pope))
    mmmu = {"question": "<image 1> a?", "options": ["a dog", "two"], "answer": "B", "question_type": "multiple-choice"}
    openly = {"question": "what is it?", "options": [], "answer": "a dog", "question_type": "open"}
    rows = [
        {"id": "validation_Art_Theory_1", "image": names[0], **mmmu},
        {"id": "validation_Art_Theory_2", "image": names[1], **openly},
    ]
    (folder / "mmmu").write_text(lines(rows))
    two = "Is it a dog? Please answer yes or no.\tYes\nIs it two cats? Please answer yes or no.\tNo\n"
    for task, texts, pictures in (
        ("existence", "", ""),
        ("artwork", "questions_answers_YN", "images"),
        ("OCR", "", ""),
    ):
        for own, name in ((pictures, f"{task}1.jpg"), (pictures, f"{task}2.png")):
            (folder / "mme" / task / own).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (30, 40), (0, len(task), 90)).save(folder / "mme" / task / own / name)
            (folder / "mme" / task / texts).mkdir(exist_ok=True)
            (folder / "mme" / task / texts / name).with_suffix(".txt").write_text(two + "\n")
    (folder / "mme" / "eval_tool").mkdir()
    (folder / "mme" / "eval_tool" / "readme.txt").write_text("how to score")
    gqa = {str(70 + i): {"imageId": name[:-4], "question": "a dog?", "answer": "yes"} for i, name in enumerate(names)}
    (folder / "gqa").write_text(json.dumps(gqa))
    shown = base64.b64encode((folder / "pictures" / names[0]).read_bytes()).decode()
    columns = ("index", "question", "hint", "A", "B", "C", "answer", "category", "image", "l2-category")
    with open(folder / "mmbench", "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerows([columns, (5, 'a "dog"?', "in\nit", "yes", "no", "", "A", "c", shown, "l")])
        writer.writerow((1_000_005, 'a "dog"?', "in\nit", "no", "yes", "", "B", "c", 5, "l"))
        writer.writerow((7, "two?", "", "a dog", "two", "an owl", "B", "d", shown, "l"))
    return folder


def run(name: str, pipe: Any, place: Path, out: Path, **more: Any) -> Path | None:
    suite = SUITES[name]
    return run_benchmark(suite, pipe, place / name, out, place / "pictures" if suite.needs_pictures else None, **more)


def rows_of(out: Path) -> dict[int, dict]:
    entries = [json.loads(line) for line in (out / RESULTS / MANIFEST).read_text().splitlines()[1:]]
    return {entry["number"]: entry for entry in entries}


def geneval(out: Path, place: Path) -> None:
    """evaluate_images.py: folders of digits, `metadata.jsonl` as one object, samples of digits."""
    prompts = [json.loads(line) for line in (place / "geneval").read_text().splitlines()]
    folders = sorted(out.iterdir())
    assert [f.name for f in folders] == ["00000", "00001"] and all(f.name.isdigit() for f in folders)
    for number, (folder, prompt) in enumerate(zip(folders, prompts, strict=True)):
        assert json.loads((folder / "metadata.jsonl").read_text()) == prompt
        samples = sorted(p for p in (folder / "samples").iterdir() if re.fullmatch(r"\d+\.png", p.name))
        assert len(samples) == 4
        for k, sample in enumerate(samples):
            assert sample.read_bytes() == (out.parent / RESULTS / f"{4 * number + k:06d}.png").read_bytes()


def geneval2(out: Path, place: Path) -> None:
    paths = json.loads((out / "paths.json").read_text())
    assert list(paths) == ["a dog", "two cats"]
    assert all(Image.open(out / path).size == (WIDTH, HEIGHT) for path in paths.values())


def dpg(out: Path, place: Path) -> None:
    """compute_dpg_bench.py: nothing but pictures, keys up to the first dot, four crops of one side in reading order."""
    assert sorted(p.name.split(".")[0] for p in out.iterdir()) == ["partiprompts_1", "stanford_2"]
    sheet = Image.open(out / "partiprompts_1.png")
    assert sheet.size == (2 * WIDTH, 2 * HEIGHT)
    for k, corner in enumerate([(0, 0), (WIDTH, 0), (0, HEIGHT), (WIDTH, HEIGHT)]):
        crop = sheet.crop((*corner, corner[0] + WIDTH, corner[1] + HEIGHT))
        own = Image.open(out.parent / RESULTS / f"{k:06d}.png").convert("RGB")  # files of prompts are in sorted order
        assert crop.tobytes() == own.tobytes()
    assert rows_of(out.parent)[0]["arguments"]["prompt"] == "two cats"


def compbench(out: Path, place: Path) -> None:
    """BLIPvqa_eval: names sorted by their last number, the prompt before the first underscore."""
    names = sorted((p.name for p in (out / "samples").iterdir()), key=lambda n: int(n.split("_")[-1].split(".")[0]))
    assert [name.split("_")[0] for name in names] == ["a dog"] * 10 + ["two cats"] * 10


def mjhq(out: Path, place: Path) -> None:
    assert sorted(str(p.relative_to(out)) for p in out.rglob("*.png")) == ["art/n0.png", "food/n1.png"]


def coco(out: Path, place: Path) -> None:
    """loadRes: a list, whose image ids are some of the annotation file's."""
    found = json.loads((out / "coco-captions_unidiff_results.json").read_text())
    assert [set(entry) for entry in found] == [{"image_id", "caption"}] * 2
    assert [entry["image_id"] for entry in found] == [7, 9]
    assert [entry["caption"] for entry in found] == [rows_of(out.parent)[n]["words"] for n in range(2)]


def vqav2(out: Path, place: Path) -> None:
    """loadRes: a list with an answer for exactly the questions of the file."""
    found = json.loads((out / "vqav2_unidiff_results.json").read_text())
    assert [entry["question_id"] for entry in found] == [70, 71] and all(
        set(e) == {"question_id", "answer"} for e in found
    )


def pope(out: Path, place: Path) -> None:
    """evaluate.py reads both files line by line, in the same order."""
    questions = [json.loads(line) for line in (place / "pope").read_text().splitlines()]
    answers = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert [a["question"] for a in answers] == [q["text"] for q in questions]
    assert all(isinstance(a["answer"], str) for a in answers)


def mmmu(out: Path, place: Path) -> None:
    """main_parse_and_eval.py: a folder for each category."""
    first, second = json.loads((out / "Art_Theory" / "output.json").read_text())
    assert first["all_choices"] == ["A", "B"] and first["index2ans"] == {"A": "a dog", "B": "two"}
    assert (first["question_type"], second["question_type"]) == ("multiple-choice", "short-answer")
    assert first["answer"] == "B" and isinstance(first["response"], str)


def mme(out: Path, place: Path) -> None:
    """calculation.py: a file of each task, two lines for a picture, four parts with tabs between them, yes or no third."""
    assert sorted(p.name for p in out.iterdir()) == ["OCR.txt", "artwork.txt", "existence.txt"]
    answers = [entry["words"] for _, entry in sorted(rows_of(out.parent).items())]
    for task, first in (("existence", 0), ("artwork", 4), ("OCR", 8)):  # in the scorer's own order
        lines = (out / f"{task}.txt").read_text(encoding="utf-8").split("\n")
        assert lines.pop() == "" and len(lines) == 4
        for n in range(0, 4, 2):
            names = set()
            for k, line in enumerate(lines[n : n + 2]):
                name, question, right, answer = line.split("\t")
                assert right.lower() in ("yes", "no") and question.endswith("Please answer yes or no.")
                assert answer == " ".join(answers[first + n + k].split())
                names.add(name)
            assert len(names) == 1 and names <= {f"{task}1.jpg", f"{task}2.png"}
    report = score_results("mme", out.parent)
    assert 0 <= report.values["mme_task.artwork"] <= 200 and report.about["n"] == 6 and len(report.about["notes"]) == 2


def gqa(out: Path, place: Path) -> None:
    """eval.py --tier gqa: a list with a prediction for every question, which is compared as it is."""
    predictions = {p["questionId"]: p["prediction"] for p in json.loads((out / "gqa_predictions.json").read_text())}
    assert list(predictions) == list(json.loads((place / "gqa").read_text()))
    words = [entry["words"] for _, entry in sorted(rows_of(out.parent).items())]
    assert [*predictions.values()] == [" ".join(w.split()).rstrip(".").lower() for w in words]
    right = [answer == "yes" for answer in predictions.values()]
    assert score_results("gqa", out.parent, place / "gqa").values == {"gqa_accuracy": sum(right) / 2}


def mmbench(out: Path, place: Path) -> None:
    """image_mcq.py: a table with tabs, named MODEL_DATASET.tsv, whose index and question are the dataset's."""
    with open(out / "unidiff_mmbench.tsv", encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file, delimiter="\t"))
    with open(place / "mmbench", encoding="utf-8", newline="") as file:
        asked = list(csv.DictReader(file, delimiter="\t"))
    for line, question, (_, entry) in zip(lines, asked, sorted(rows_of(out.parent).items()), strict=True):
        picture = question.pop("image")
        assert line == {**question, "prediction": entry["words"]} and int(line["index"]) % 1_000_000 in (5, 7)
        shown = out.parent / "pictures" / entry["arguments"]["image"]
        index = picture if len(picture) < 65 else question["index"]
        assert shown == out.parent / "pictures" / f"{index}.jpg"
        assert shown.read_bytes() == (place / "pictures" / "COCO_val2014_000000000007.jpg").read_bytes()
        assert "\nA. " in entry["arguments"]["question"] and ("\nC. an owl\n" in entry["arguments"]["question"]) == (
            question["C"] != ""
        )
    report = score_results("mmbench", out.parent)
    assert report.about["n"] == 2 and report.about["rows"] == 3 and 0 <= report.values["mmbench_category.c"] <= 1


READERS: dict[str, Callable[[Path, Path], None]] = {
    "geneval": geneval,
    "geneval2": geneval2,
    "dpg": dpg,
    "t2i-compbench": compbench,
    "mjhq": mjhq,
    "coco-captions": coco,
    "vqav2": vqav2,
    "pope": pope,
    "mmmu": mmmu,
    "mme": mme,
    "gqa": gqa,
    "mmbench": mmbench,
}


def test_every_benchmark_has_a_reader():
    assert set(READERS) == set(SUITES)


class Stop(Exception):
    pass


@pytest.mark.parametrize("name", list(READERS))
def test_scorers_read_what_is_written_also_after_two_stops(name, pipe, place, tmp_path, monkeypatch):
    whole = run(name, pipe, place, tmp_path / "whole", seed=3, batch_size=4, steps=2)
    assert whole == tmp_path / "whole" / "scorer"
    READERS[name](whole, place)
    seeds = row_seeds(3, len(rows_of(tmp_path / "whole"))).tolist()
    assert [rows_of(tmp_path / "whole")[n]["seed"] for n in range(len(seeds))] == seeds

    def stop(more: int, total: int | None) -> None:
        if more:
            raise Stop

    for _ in range(2):
        try:
            run(name, pipe, place, tmp_path / "parts", seed=3, batch_size=1, steps=2, tick=stop)
        except Stop:
            assert not (tmp_path / "parts" / "scorer").exists()
            with open(tmp_path / "parts" / RESULTS / MANIFEST, "ab") as file:
                file.write(b'{"number": 0, "wor')  # killed while it wrote
    ended = run(name, pipe, place, tmp_path / "parts", seed=3, batch_size=3, steps=2)
    trees = [{p.relative_to(f): p.read_bytes() for p in f.rglob("*") if p.is_file()} for f in (whole, ended)]
    assert trees[0] == trees[1]


def test_the_manifest_says_what_was_run(pipe, place, tmp_path):
    run("geneval2", pipe, place, tmp_path / "o", seed=3, steps=2)
    head = json.loads((tmp_path / "o" / RESULTS / MANIFEST).read_text().splitlines()[0])
    assert head["about"]["model_hash"] == model_hash(pipe) and head["about"]["benchmark"] == "geneval2"
    assert head["options"] == {"steps": 2} and "samplers" in head["about"]["settings"]
    assert head["versions"]["unidiff"] and head["seed"] == 3
    with pytest.raises(ValueError, match=r"model_hash = \"[0-9a-f]{12}\.\.\.\", here"):
        run("geneval2", tiny_pipeline(text_length=96, seed=1), place, tmp_path / "o", seed=3, steps=2)


def test_processes_share_the_rows_and_the_last_one_writes(pipe, place, tmp_path):
    assert run("geneval", pipe, place, tmp_path / "o", seed=3, steps=2, rank=0, size=2) is None
    folder = run("geneval", pipe, place, tmp_path / "o", seed=3, steps=2, rank=1, size=2)
    alone = run("geneval", pipe, place, tmp_path / "alone", seed=3, steps=2)
    for path in folder.rglob("*.png"):
        assert path.read_bytes() == (alone / path.relative_to(folder)).read_bytes()
    (folder / "results.jsonl").write_text("scores")  # of the scorer: stays
    assert run("geneval", pipe, place, tmp_path / "o", seed=3, steps=2) == folder
    assert (folder / "results.jsonl").read_text() == "scores"


def bad(name: str, text: str, place: Path, tmp_path: Path) -> tuple[Suite, Path]:
    path = tmp_path / f"{name}.txt"
    path.write_text(text)
    return SUITES[name], path


@pytest.mark.parametrize(
    "name, text, sentence",
    [
        ("geneval", '{"prompt": "a dog"}', "has no 'tag'"),
        ("geneval", "", "holds no prompts"),
        ("geneval2", '{"prompt": "a", "vqa_list": []}\n' * 2, "names a prompt twice"),
        ("dpg", "a dog", "is no folder"),
        ("t2i-compbench", "a_dog", "'_'"),
        ("mjhq", '{"../n": {"category": "art", "prompt": "a dog"}}', "no name of a file"),
        ("coco-captions", '{"images": [{"id": 1}]}', "no 'file_name'"),
        ("vqav2", '{"questions": []}', "has no 'data_subtype'"),
        ("pope", '{"question_id": 1, "image": 3, "text": "a", "label": "no"}', "no 'image'"),
        ("mmmu", "[]", "line 1"),
        ("mme", "", "holds no questions of MME"),
        ("gqa", '{"7": {"question": "a?"}}', "'7' has no imageId"),
        ("gqa", '{"7": {"question": "a?", "imageId": "../n"}}', "no name of a file"),
        ("mmbench", "index\tquestion\n1\ta", "has no column 'image'"),
        ("mmbench", "index\timage\tquestion\tA\tB\n1\t9\ta?\tx\ty", "the picture of row '9', which has none"),
        ("mmbench", "index\timage\tquestion\tA\tB\nx\t9\ta?\tx\ty", "the index 'x'"),
        ("mmbench", "index\timage\tquestion\tA\tB\n1\t9\ta?\tx", "a row 2 of another length"),
        ("mmbench", "index\timage\tquestion\tA\tB\n1\t" + "?" * 65 + "\ta?\tx\ty", "the picture of index 1"),
    ],
)
def test_bad_prompts_are_one_sentence(pipe, place, tmp_path, name, text, sentence):
    suite, path = bad(name, text, place, tmp_path)
    with pytest.raises(ValueError, match=sentence) as error:
        run_benchmark(suite, pipe, path, tmp_path / "o", place / "pictures" if suite.needs_pictures else None)
    assert "\n" not in str(error.value) and not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("Is it?\tYes\n", "two lines"),
        ("Is it?\tYes\nIs it?\tmaybe\n", "two lines"),
        ("a?\tYes\nb?\tNo", "not there: 1"),
    ],
)
def test_bad_folders_of_mme_are_one_sentence(pipe, tmp_path, text, sentence):
    (tmp_path / "mme" / "count").mkdir(parents=True)
    (tmp_path / "mme" / "count" / "1.txt").write_text(text)
    with pytest.raises(ValueError, match=sentence) as error:
        run_benchmark(SUITES["mme"], pipe, tmp_path / "mme", tmp_path / "o")
    assert "1.txt" in str(error.value) and not (tmp_path / "o").exists()


def test_pictures_of_another_table_are_refused(pipe, place, tmp_path):
    (tmp_path / "o" / "pictures").mkdir(parents=True)
    (tmp_path / "o" / "pictures" / "5.jpg").write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"another picture than .* name another folder"):
        run("mmbench", pipe, place, tmp_path / "o")
    assert (tmp_path / "o" / "pictures" / "5.jpg").read_bytes() == b"mine"
    with pytest.raises(ValueError, match="pictures beside its questions; leave pictures out"):
        run_benchmark(SUITES["mmbench"], pipe, place / "mmbench", tmp_path / "o", tmp_path)


def test_missing_pictures_are_named(pipe, place, tmp_path):
    with pytest.raises(ValueError, match=r"2 rows were refused, row 0 because .*COCO_val2014.*does not exist; mend"):
        run_benchmark(SUITES["pope"], pipe, place / "pope", tmp_path / "o", tmp_path)
    assert "COCO_val2014" in rows_of(tmp_path / "o")[0]["error"]
    with pytest.raises(ValueError, match="name their folder"):
        run_benchmark(SUITES["pope"], pipe, place / "pope", tmp_path / "o")
    with pytest.raises(ValueError, match="leave pictures out"):
        run_benchmark(SUITES["geneval"], pipe, place / "geneval", tmp_path / "o", tmp_path)


def test_what_cannot_be_done_is_said_before_anything_is_written(pipe, place, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(type(pipe.layout), "tasks", property(lambda self: ("caption",)))
        with pytest.raises(ValueError, match="cannot do 'text_to_image'; it does caption"):
            run("geneval", pipe, place, tmp_path / "o")
    assert not (tmp_path / "o").exists()
    (tmp_path / "o" / "scorer").mkdir(parents=True)
    with pytest.raises(ValueError, match="of a run whose rows are gone; remove it, or name another folder"):
        run("geneval", pipe, place, tmp_path / "o")
    assert not (tmp_path / "o" / RESULTS).exists()
    run_rows(pipe, [{"prompt": "a dog"}], tmp_path / "rows", place, steps=2)
    with pytest.raises(ValueError, match=r"rows of `unidiff generate --prompts`; name another folder"):
        run("geneval", pipe, place, tmp_path / "rows")
    (tmp_path / "file").write_text("mine")
    with pytest.raises((ValueError, OSError)):
        run("geneval", pipe, place, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_answers_of_a_run_that_is_not_finished_are_not_scored(pipe, place, tmp_path):
    for name in ("gqa", "mme", "mmbench", "mmmu"):
        suite = SUITES[name]
        rows = asked_rows(suite, place / name, tmp_path / name, place / "pictures" if suite.needs_pictures else None)
        run_rows(pipe, rows, tmp_path / name / RESULTS, tmp_path / "none")  # no picture is there
        against = place / "gqa" if name == "gqa" else None
        with pytest.raises(ValueError, match=f"has 0 of {len(rows)} rows; finish the run first"):
            score_results(name, tmp_path / name, against)


@pytest.mark.slow
def test_the_command(pipe, place, tmp_path):
    pipe.save_pretrained(tmp_path / "model")
    words = ["eval", "run", "geneval", "--model", str(tmp_path / "model"), "--prompts", str(place / "geneval")]
    words += ["--out", str(tmp_path / "o"), "--steps", "2", "--seed", "3"]
    done = subprocess.run([sys.executable, "-m", "unidiff", *words], capture_output=True, text=True, check=True)
    assert "evaluate_images.py" in done.stdout
    READERS["geneval"](tmp_path / "o" / "scorer", place)
