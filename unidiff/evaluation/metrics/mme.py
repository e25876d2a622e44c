"""MME scores (Fu et al. 2023, arXiv 2306.13394) by the rules of its scorer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from unidiff.errors import few, reading
from unidiff.evaluation.metrics.base import Metric, Numbers
from unidiff.evaluation.report import Estimate
from unidiff.evaluation.results.base import Results, scorer_folder
from unidiff.evaluation.suites.mme import COGNITION, PERCEPTION


def said(answer: str) -> str:
    """yes or no by the first four letters of an answer, and "" for anything else."""
    start = answer.lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else ""


def points(right: int) -> float:
    """What a picture adds to the score of its task when so many of its two questions are answered rightly: 100 for the share
    of right answers, and 100 more where both are right."""
    return 50.0 * right + (100.0 if right == 2 else 0.0)


def _pictures(path: Path) -> Iterator[tuple[str, float]]:
    """The name of every picture of a task, and its points."""
    with reading(path, "answers of MME in UTF-8"):
        lines = [line.split("\t") for line in path.read_text(encoding="utf-8").split("\n") if line]
    for first, second in zip(lines[::2], lines[1::2] + [[]] * (len(lines) % 2), strict=True):
        if len(first) != 4 or len(second) != 4 or first[0] != second[0]:
            raise ValueError(
                f"{str(path)!r} has no two questions about {first[0]!r:.80}, each with two answers; run again"
            )
        if wrong := [line[2] for line in (first, second) if line[2].lower() not in ("yes", "no")]:
            raise ValueError(
                f"{str(path)!r} has {wrong[0]!r:.40} for the right answer about {first[0]!r:.80}; expected Yes or No"
            )
        yield first[0], points(sum(said(line[3]) == line[2].lower() for line in (first, second)))


def _mme(results: Results) -> Numbers:
    folder = scorer_folder(results.path("made"))
    scores: dict[str, list[float]] = {}
    for task in (*PERCEPTION, *COGNITION):
        if (path := folder / f"{task}.txt").is_file():
            found = list(_pictures(path))
            if not found:
                raise ValueError(f"{str(path)!r} is empty; run again")
            scores[task] = [score for _, score in found]
            results.keys += [f"{task} {name}" for name, _ in found]
    if not scores:
        raise FileNotFoundError(f"{str(folder)!r} has no files of MME's tasks, as `unidiff eval run mme` writes them")
    numbers: dict[str, Estimate | float] = {}
    for name, tasks in (("mme_perception", PERCEPTION), ("mme_cognition", COGNITION)):
        if missing := [task for task in tasks if task not in scores]:
            results.notes.append(f"{name} is left out: {len(missing)} of its tasks are missing ({few(missing)})")
        else:  # the sum, as the mean of tasks that count so many times
            numbers[name] = Estimate.average([Estimate.mean(len(tasks) * np.array(scores[task])) for task in tasks])
    return numbers | {f"mme_task.{task}": Estimate.mean(own) for task, own in scores.items()}


MME = Metric("mme", None, _mme, "a folder of TASK.txt, as `unidiff eval run mme` writes it")
