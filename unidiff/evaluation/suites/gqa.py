"""GQA (Hudson and Manning 2019): questions whose answers are compared letter by letter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unidiff.evaluation.suites.base import Result, Suite, read_object
from unidiff.files import write_json


def questions(path: Path) -> dict[str, dict[str, Any]]:
    """The questions of a `*_questions.json`, by number: imageId, question, and answer where the split has one.

    Raises:
        ValueError: another layout.
    """
    found = read_object(path)
    for number, entry in found.items():
        if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in ("imageId", "question")):
            raise ValueError(
                f"{str(path)!r}: {number!r:.80} has no imageId and question; name a *_questions.json of GQA"
            )
        if "/" in entry["imageId"] or "\0" in entry["imageId"]:
            raise ValueError(
                f"{str(path)!r}: {number!r:.80} has the imageId {entry['imageId']!r:.80}, no name of a file"
            )
    return found


def plain_answer(words: str) -> str:
    """An answer as the scorer counts it: all right answers are in small letters, without a full stop."""
    return " ".join(words.split()).rstrip(".").lower()


def _write(path: Path, results: Sequence[Result], folder: Path) -> None:
    """`TIER_predictions.json`: questionId and prediction of every question."""
    pairs = zip(questions(path), results, strict=True)
    entries = [{"questionId": number, "prediction": plain_answer(result.words)} for number, result in pairs]
    write_json(folder / f"{path.stem.removesuffix('_questions')}_predictions.json", entries)


GQA = Suite(
    "gqa",
    lambda path: [
        {"image": f"{entry['imageId']}.jpg", "question": entry["question"], "task": "answer"}
        for entry in questions(path).values()
    ],
    _write,
    "GQA's eval.py --tier TIER with FILE beside the questions, or unidiff eval score gqa",
    reads=True,
)
