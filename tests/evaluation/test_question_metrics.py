"""MME, GQA and MMBench: numbers by hand, as the benchmarks' own scorers count."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from unidiff.evaluation.metrics.mmbench import chosen
from unidiff.evaluation.scoring import score_results
from unidiff.evaluation.suites.mme import COGNITION, PERCEPTION


def write(path: Path, data: object) -> Path:
    path.write_text(json.dumps(data))
    return path


def mme_file(folder: Path, task: str, *pairs: tuple[str, str]) -> None:
    lines = [
        f"{n}.jpg\t{words}\t{right}\t{answer}\n"
        for n, pair in enumerate(pairs)
        for words, right, answer in zip(("a?", "b?"), ("Yes", "No"), pair, strict=True)
    ]
    (folder / f"{task}.txt").write_text("".join(lines))


def test_mme_by_hand(tmp_path):
    """100 for the share of right answers, and 100 for the share of pictures with both right; "other" is wrong."""
    for task in (*PERCEPTION, *COGNITION):
        mme_file(tmp_path, task, ("Yes.", "no"), ("yes", "Yes, it is"))
    mme_file(tmp_path, "count", ("It is", " NO"), ("", "not sure"), ("yes", "no"))
    report = score_results("mme", tmp_path)
    tasks = dict.fromkeys((*PERCEPTION, *COGNITION), 75 + 50.0) | {"count": 100 * 4 / 6 + 100 / 3}
    assert {t: report.values[f"mme_task.{t}"] for t in tasks} == pytest.approx(tasks)
    assert report.values["mme_perception"] == pytest.approx(sum(tasks[t] for t in PERCEPTION))
    assert report.values["mme_cognition"] == pytest.approx(4 * 125)
    interval = report.intervals["mme_cognition"]
    error = 1.959964 * (4 * 2 * 75**2 / 2) ** 0.5  # 200 and 50 points: a variance of 2 * 75^2 for each of four tasks
    assert interval.high - interval.value == pytest.approx(error, rel=1e-5) and report.about["notes"] == []
    (tmp_path / "OCR.txt").unlink()
    report = score_results("mme", tmp_path)
    assert "mme_perception" not in report.values and "mme_cognition" in report.values
    assert report.about["notes"] == ["mme_perception is left out: 1 of its tasks are missing (OCR)"]
    for damage, said in (("", "is empty"), ("1.jpg\ta?\tYes\tno\n", "no two questions"), ("a\n", "no two questions")):
        (tmp_path / "count.txt").write_text(damage)
        with pytest.raises(ValueError, match=said):
            score_results("mme", tmp_path)
    with pytest.raises(FileNotFoundError, match="no files of MME"):
        score_results("mme", tmp_path / "gone")


def test_gqa_by_hand(tmp_path):
    kinds = {"1": "query", "2": "verify", "3": "query", "4": "query"}
    asked = {
        n: {"imageId": "n", "question": "a?", "answer": "cat", "types": {"structural": k}} for n, k in kinds.items()
    }
    asked["4"]["isBalanced"] = False  # which the scorer leaves out
    against = write(tmp_path / "questions.json", asked)
    said = [{"questionId": n, "prediction": w} for n, w in zip("1234", ("cat", "cat", "Cat", "cat"), strict=True)]
    report = score_results("gqa", write(tmp_path / "x_predictions.json", said), against)
    assert report.values == pytest.approx({"gqa_accuracy": 2 / 3, "gqa_kind.open": 1 / 2, "gqa_kind.binary": 1.0})
    for bad, match in ((said[1:], "1 questions have no answer: 1"), ([*said, said[0]], "answered twice")):
        with pytest.raises(ValueError, match=match):
            score_results("gqa", write(tmp_path / "bad.json", bad), against)
    del asked["2"]["answer"]
    with pytest.raises(ValueError, match="no right answer"):
        score_results("gqa", write(tmp_path / "y.json", said), write(tmp_path / "test.json", asked))


OPTIONS = {"A": "a dog", "B": "two cats", "C": "none"}


@pytest.mark.parametrize(
    "answer, letter",
    [
        ("B", "B"),
        ("(C).", "C"),
        ("The answer is B!", "B"),
        ("A", "A"),
        ("A big brown dog", ""),  # an article
        ("A big dog: a dog", "A"),
        ("B or C", ""),
        ("it shows Two Cats", "B"),
        ("two cats and a dog", ""),
        ("two cats " * 5, ""),  # too long
        ("", ""),
    ],
)
def test_letters_of_mmbench(answer, letter):
    assert chosen(answer, OPTIONS) == letter


def test_mmbench_by_hand(tmp_path):
    columns = ("index", "question", "A", "B", "answer", "category", "l2-category", "prediction")
    rows = [
        (1, "a?", "x", "y", "A", "one", "l", "A"),
        (1_000_001, "a?", "y", "x", "B", "one", "l", "B."),
        (2, "b?", "x", "y", "A", "two", "l", "A"),
        (1_000_002, "b?", "y", "x", "B", "two", "l", "nothing at all"),  # right but for one order of the options
        (3, "c?", "x", "y", "B", "two", "l", "B"),
    ]
    path = tmp_path / "unidiff_MMBench.tsv"
    text = lambda rows: "\n".join("\t".join(map(str, row)) for row in [columns, *rows])  # noqa: E731
    path.write_text(text(rows))
    report = score_results("mmbench", tmp_path)
    expected = {"mmbench_accuracy": 2 / 3, "mmbench_ability.l": 2 / 3}
    assert report.values == pytest.approx({**expected, "mmbench_category.one": 1, "mmbench_category.two": 1 / 2})
    assert report.about["notes"] == ["1 of 5 answers name no option; they count as wrong"]
    path.write_text(text([]))
    with pytest.raises(ValueError, match="is empty"):
        score_results("mmbench", path)
    path.write_text(text([(1, "a?", "x", "y", "", "one", "l", "A")]))
    with pytest.raises(ValueError, match="no right answer to 1"):
        score_results("mmbench", path)
