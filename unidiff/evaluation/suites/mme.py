"""MME (Fu et al. 2023, arXiv 2306.13394): two questions about each picture, of which one is to be answered with yes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from unidiff.errors import check_regular, reading
from unidiff.evaluation.suites.base import Result, Suite
from unidiff.files import replace_text

PERCEPTION = ["existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR"]
COGNITION = ["commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"]
"""Folders of the benchmark, and names of the files that its scorer reads."""
_ENDINGS = (".jpg", ".png", ".jpeg")


class Question(NamedTuple):
    """A question; `picture` counts from the folder of the benchmark, `answer` is Yes or No."""

    task: str
    picture: Path
    words: str
    answer: str


def questions(folder: Path) -> list[Question]:
    """The questions of a folder `TASK/NAME.jpg` with `TASK/NAME.txt`, or `TASK/images` with `TASK/questions_answers_YN`.

    Raises:
        ValueError: none of the tasks' folders, texts that are no two questions, or one without a picture.
    """
    found = [question for task in (*PERCEPTION, *COGNITION) for question in _of_task(folder, task)]
    if not found:
        raise ValueError(
            f"{str(folder)!r} holds no questions of MME; name the folder that has {', '.join(PERCEPTION[:3])} and the others"
        )
    return found


def _of_task(folder: Path, task: str) -> Iterator[Question]:
    own = folder / task
    apart = (own / "questions_answers_YN").is_dir()
    texts, pictures = (own / "questions_answers_YN", own / "images") if apart else (own, own)
    for path in sorted(texts.glob("*.txt")):
        check_regular(path)
        with reading(path, "questions of MME in UTF-8"):
            lines = [line.split("\t") for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        if len(lines) != 2 or not all(len(parts) == 2 and parts[1].strip() in ("Yes", "No") for parts in lines):
            raise ValueError(f"{str(path)!r} is not two lines of MME, each a question, a tab, and Yes or No")
        seen = [name for ending in _ENDINGS if (name := pictures / f"{path.stem}{ending}").is_file()]
        if not seen:
            raise ValueError(f"{str(path)!r} asks about a picture that is not there: {path.stem}.jpg or .png")
        for words, answer in lines:
            yield Question(task, seen[0].relative_to(folder), words.strip(), answer.strip())


def _write(path: Path, results: Sequence[Result], folder: Path) -> None:
    """`TASK.txt`: name of the picture, question, right answer and the model's, with tabs between them."""
    lines: dict[str, list[str]] = {}
    for question, result in zip(questions(path), results, strict=True):
        parts = question.picture.name, question.words, question.answer, " ".join(result.words.split())
        lines.setdefault(question.task, []).append("\t".join(parts) + "\n")
    for task, own in lines.items():
        replace_text(folder / f"{task}.txt", "".join(own))


MME = Suite(
    "mme",
    lambda path: [{"image": q.picture.as_posix(), "question": q.words, "task": "answer"} for q in questions(path)],
    _write,
    "calculation.py --results_dir FOLDER of MME's eval_tool, or unidiff eval score mme",
    reads=True,
    own_pictures=lambda path, out: path,
)
