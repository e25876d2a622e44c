"""Benchmarks of words about given pictures."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unidiff.evaluation.suites.base import (
    Result,
    Suite,
    check_entries,
    read_lines,
    read_object,
    with_choices,
    write_lines,
)
from unidiff.files import write_json
from unidiff.pipelines.batch import Row


def _coco(path: Path) -> list[dict[str, Any]]:
    """The pictures of a COCO annotation file, or of Flickr30k in its layout, by number."""
    entries = read_object(path, ("images",))["images"]
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{str(path)!r} has no list of images; name a captions_*.json of COCO")
    check_entries(path, entries, {"id": int, "file_name": str})
    return sorted(entries, key=lambda entry: entry["id"])


def _write_coco(path: Path, results: Sequence[Result], folder: Path) -> None:
    """`NAME_unidiff_results.json`: image_id and caption of every picture."""
    entries = [{"image_id": e["id"], "caption": r.words} for e, r in zip(_coco(path), results, strict=True)]
    write_json(folder / f"{path.stem}_unidiff_results.json", entries)


COCO = Suite(
    "coco-captions",
    lambda path: [{"image": entry["file_name"], "task": "caption"} for entry in _coco(path)],
    _write_coco,
    "pycocoevalcap: COCO(annotations).loadRes(FILE), then COCOEvalCap",
    reads=True,
)


def _vqa(path: Path) -> tuple[str, list[dict[str, Any]]]:
    """The split whose pictures are meant, and the questions of VQAv2."""
    data = read_object(path, ("data_subtype", "questions"))
    split, entries = str(data["data_subtype"]), data["questions"]
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{str(path)!r} has no list of questions; name a v2_OpenEnded_*_questions.json")
    check_entries(path, entries, {"question_id": int, "image_id": int, "question": str})
    return split.replace("test-dev", "test"), entries


def _vqa_rows(path: Path) -> list[Row]:
    split, entries = _vqa(path)
    picture = lambda entry: f"COCO_{split}_{entry['image_id']:012d}.jpg"  # noqa: E731
    return [{"image": picture(e), "question": e["question"], "task": "answer"} for e in entries]


def _write_vqa(path: Path, results: Sequence[Result], folder: Path) -> None:
    """`NAME_unidiff_results.json`: question_id and answer of every question."""
    entries = [
        {"question_id": e["question_id"], "answer": r.words} for e, r in zip(_vqa(path)[1], results, strict=True)
    ]
    write_json(folder / f"{path.stem.removesuffix('_questions')}_unidiff_results.json", entries)


VQAV2 = Suite(
    "vqav2",
    _vqa_rows,
    _write_vqa,
    "VQA's loadRes(FILE, QUESTIONS) and VQAEval, or the evaluation server for the test splits",
    reads=True,
)


def _pope(path: Path) -> list[dict[str, Any]]:
    entries = list(read_lines(path, ("question_id", "image", "text", "label")))
    check_entries(path, entries, {"image": str, "text": str})
    return entries


def _write_pope(path: Path, results: Sequence[Result], folder: Path) -> None:
    """`answers.jsonl`: question and answer, in the order of the questions."""
    answers = [{"question": e["text"], "answer": r.words} for e, r in zip(_pope(path), results, strict=True)]
    write_lines(folder / "answers.jsonl", answers)


POPE = Suite(
    "pope",
    lambda path: [{"image": e["image"], "question": e["text"], "task": "answer"} for e in _pope(path)],
    _write_pope,
    "evaluate.py of POPE, with answers.jsonl beside the questions",
    reads=True,
)

_MARK = re.compile(r"<image \d+>")


def _mmmu(path: Path) -> list[dict[str, Any]]:
    """Questions of MMMU as JSON lines: id, question, options, answer, question_type and the file of the picture."""
    entries = list(read_lines(path, ("id", "question", "options", "answer", "question_type", "image")))
    check_entries(path, entries, {"id": str, "question": str, "options": list, "image": str})
    for entry in entries:
        if entry["question_type"] not in ("multiple-choice", "open"):
            raise ValueError(
                f"{str(path)!r}: {entry['id']} has question_type {entry['question_type']!r}; expected one of MMMU's"
            )
        if len(entry["options"]) > 26:
            raise ValueError(f"{str(path)!r}: {entry['id']} has {len(entry['options'])} options; expected at most 26")
        shown = len(set(_MARK.findall(" ".join([entry["question"], *map(str, entry["options"])]))))
        if shown > 1:
            raise ValueError(
                f"{str(path)!r}: {entry['id']} is about {shown} pictures; leave out questions about several"
            )
    return entries


def _choices(entry: dict[str, Any]) -> dict[str, str]:
    return {chr(ord("A") + number): str(option) for number, option in enumerate(entry["options"])}


def _mmmu_question(entry: dict[str, Any]) -> str:
    words = _MARK.sub("", entry["question"]).strip()
    if entry["question_type"] != "multiple-choice":
        return f"{words}\nAnswer with a word or a short phrase."
    return with_choices(words, _choices(entry))


def _write_mmmu(path: Path, results: Sequence[Result], folder: Path) -> None:
    """`CATEGORY/output.json`: questions with their responses, which the scorer reads the answers from."""
    categories: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for entry, result in zip(_mmmu(path), results, strict=True):
        several = entry["question_type"] == "multiple-choice"
        choices = _choices(entry) if several else {}
        row = {"id": entry["id"], "question_type": "multiple-choice" if several else "short-answer"}
        row |= {"answer": entry["answer"], "all_choices": list(choices), "index2ans": choices, "response": result.words}
        categories["_".join(entry["id"].split("_")[1:-1]) or "all"].append(row)
    for name, rows in categories.items():
        (folder / name).mkdir()
        write_json(folder / name / "output.json", rows)


MMMU = Suite(
    "mmmu",
    lambda path: [{"image": e["image"], "question": _mmmu_question(e), "task": "answer"} for e in _mmmu(path)],
    _write_mmmu,
    "main_parse_and_eval.py --path FOLDER --subject ALL",
    reads=True,
)
