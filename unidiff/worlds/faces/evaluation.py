"""`unidiff eval faces`: the whole evaluation and the metrics, for one pipeline."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from unidiff.evaluation.benchmark.trials import REFERENCE, JudgedTasks
from unidiff.evaluation.kept import KeptRows
from unidiff.evaluation.metrics.base import CaptionedPictures
from unidiff.evaluation.report import EvaluationReport, Measure
from unidiff.pipeline import UniDiffPipeline
from unidiff.worlds.asked import PipelineModel
from unidiff.worlds.faces.cases import (
    case_faces,
    held_out_cases,
    hole_cases,
    holes,
    prompt_cases,
    question_cases,
    wrong_captions,
)
from unidiff.worlds.faces.judge import TASKS, FacesEval, agrees, yardstick
from unidiff.worlds.faces.language import caption_entropy, caption_surprise, draw_caption, parse_caption
from unidiff.worlds.faces.reader import read_faces
from unidiff.worlds.faces.scenes import IMAGE_SIZE, FaceGenerator, render_batch
from unidiff.worlds.judging import Examination, examine

ALL_TASKS = (*TASKS, "likelihood")
"""What runs where nothing is asked for; other metrics run when they are named."""
DISTRACTORS = 10
QUICK = 300
"""Cases per category."""
PARTS = {"text_to_image": 2}
"""Categories of the tasks that have more than one."""


def run_faces_eval(
    pipe: UniDiffPipeline,
    seed: int = 0,
    n: int = QUICK,
    per_task: int | None = None,
    tasks: Sequence[str] | None = None,
    batch_size: int = 64,
    tick: Callable[..., None] = lambda more, total=None, what="": None,
    kept: KeptRows | None = None,
    **options: Any,
) -> EvaluationReport:
    """Evaluate a pipeline on faces; arguments as of `World.evaluate`.

    Raises:
        ValueError: an unknown task, n or per_task below 1, or a pipeline whose pictures are not 64 x 64.
    """
    check_size(pipe)
    of = Examination(
        lambda model, progress: FacesEval(model, seed, n, progress),
        tuple(task for task in TASKS if task != "reader"),
        PARTS,
        lambda count: captions(count, seed, batch_size),
        measure_of,
        ALL_TASKS,
    )
    return examine(pipe, of, n, per_task, tasks, batch_size, tick, kept, options)


def check_size(pipe: UniDiffPipeline) -> None:
    """Raise `ValueError` unless a pipeline draws pictures of the size of faces."""
    height, width = pipe.image_size
    if (height, width) != (IMAGE_SIZE, IMAGE_SIZE):
        raise ValueError(f"faces are {IMAGE_SIZE}x{IMAGE_SIZE} pictures, this model makes {width}x{height}")


def captions(n: int, seed: int, batch_size: int = 64) -> CaptionedPictures:
    """Fresh faces for metrics, with captions whose surprise and entropy are known exactly."""
    faces = case_faces("likelihood", n, seed)
    said = [draw_caption(face, random.Random(f"faces likelihood|{seed}|{i}")) for i, face in enumerate(faces)]
    pairs = list(zip(said, faces, strict=True))
    return CaptionedPictures(
        said,
        lambda start, stop: render_batch(faces[start:stop]),
        [caption_surprise(caption, face) for caption, face in pairs],
        [caption_entropy(face) for face in faces],
        [
            wrong_captions(caption, face, DISTRACTORS, random.Random(f"faces retrieval|{seed}|{i}"))
            for i, (caption, face) in enumerate(pairs)
        ],
        seed,
        batch_size,
        prompts=[case.prompt for case in held_out_cases(n, seed)],
        shows=shown,
    )


def shown(texts: Sequence[str], pictures: Tensor) -> list[bool]:
    """Whether the reader finds in each picture all that the text says."""
    pairs = zip(texts, read_faces(pictures), strict=True)
    return [agrees(parse_caption(text), reading) for text, reading in pairs]


def reader_reward(
    pipe: UniDiffPipeline, seed: int, kinds: Sequence[float] | None = None
) -> tuple[Callable[[list[str], Tensor], Tensor], Callable[[int], str]]:
    """1 where the reader finds all that the prompt says; and prompts by number. There is one kind of faces."""
    check_size(pipe)
    faces = FaceGenerator(seed)
    reward = lambda texts, pictures: torch.tensor(shown(texts, pictures), dtype=torch.float32)  # noqa: E731
    return reward, lambda number: draw_caption(faces.face(number), faces.rng(number, "texts"))


QUALITY = {
    "text_to_image": "text_to_image",
    "caption": "caption_exact",
    "answer": "answer_accuracy",
    "inpaint": "inpainting",
    "generate": "joint_agreement",
}
_PICTURES, _TEXTS = ("model", "passes-16", REFERENCE), ("model", "threshold-0.5", "threshold-0.7", REFERENCE)
SWEEP = dict(zip(QUALITY, (_PICTURES, _TEXTS, _TEXTS, _PICTURES, _PICTURES), strict=True))


def judged_tasks() -> JudgedTasks:
    """What `unidiff.evaluation.benchmark.trained` asks of this world; joint generation is measured when asked for."""
    usual = tuple(task for task in QUALITY if task != "generate")
    return JudgedTasks(QUALITY, usual, SWEEP, judge, decode, yardstick)


def judge(pipe: UniDiffPipeline, task: str, cases: int, seed: int, batch: int, **options: Any) -> EvaluationReport:
    """The report of one task."""
    check_size(pipe)
    return FacesEval(PipelineModel(pipe, batch, **options), seed, cases).run([task])


def decode(
    pipe: UniDiffPipeline, task: str, rows: int, seed: int, batch: int, on_output: Callable[..., Any], **options: Any
) -> None:
    """Decode rows of a task."""
    check_size(pipe)
    model, seeds = PipelineModel(pipe, batch, on_output, **options), list(range(seed, seed + rows))
    if task == "generate":
        model.generate(seeds)
    elif task == "text_to_image":
        model.text_to_image([case.prompt for case in prompt_cases(rows, seed)], seeds)
    elif task == "caption":
        model.caption(render_batch(case_faces("caption", rows, seed)), seeds)
    elif task == "answer":
        asked = question_cases(rows, seed)
        model.answer(render_batch([case.face for case in asked]), [case.question for case in asked], seeds)
    else:
        torn = hole_cases(rows, seed)
        model.inpaint(render_batch([case.face for case in torn]), holes(torn), torn, seeds)


_WORDS = {
    "reader_true": "true faces read exactly",
    "reconstruction_exact": "pictures that come back exactly from the image tokenizer",
    "text_to_image": "stated attributes that the pictures show",
    "all_attributes": "pictures that show all that is stated",
    "whole_pictures": "pictures that are faces of the world to the last pixel",
    "held_out_pairs": "pictures that show both values of a held-out pair",
    "caption_exact": "captions that are right",
    "caption_readable": "captions that are in the grammar",
    "answer_accuracy": "answers that are right",
    "answer_baseline": "best constant answer for each kind of question",
    "inpainting": "picture and caption agree, nothing else touched",
    "inpainting_agrees": "caption agrees with the picture",
    "inpainting_untouched": "what was given is unchanged",
    "inpainting_whole": "pictures that are faces of the world to the last pixel",
    "joint_agreement": "caption agrees with the picture",
    "joint_whole": "pictures that are faces of the world to the last pixel",
    "joint_distinct": "distinct faces, as a share of the data's",
    "joint_entropy": "entropy of the attributes' values, as a share of the data's",
    "caption_nelbo": "NELBO of captions given the picture, nats",
    "caption_entropy": "entropy of captions given the picture, nats: the least that is possible",
    "caption_gap": "NELBO of captions above the entropy, nats",
    "image_nelbo": "NELBO of pictures given the caption, nats",
    "joint_nelbo": "joint NELBO, nats",
}
_NEITHER = ("answer_baseline", "caption_entropy", "joint_distinct", "joint_entropy")
_HEADLINES = ("text_to_image", "held_out_pairs", "caption_exact", "answer_accuracy", "inpainting", "joint_agreement")


def measure_of(task: str, key: str) -> Measure:
    """How the number of this key, which a task found, is shown."""
    words = _WORDS.get(key) or key.rpartition(".")[2].replace("_", " ")
    neither = key in _NEITHER or key.endswith("_words")
    better = "" if neither else "lower" if "nelbo" in key or key == "caption_gap" else "higher"
    return Measure(task, words, key in _HEADLINES, better)
