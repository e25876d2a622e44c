"""EmojiEval for the benchmark of decodes: which number of which task, and the rows that are timed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from unidiff.evaluation.benchmark.settings import REFERENCE, JudgedTasks
from unidiff.evaluation.report import EvaluationReport
from unidiff.pipeline import UniDiffPipeline
from unidiff.pipelines.output import UniDiffOutput
from unidiff.worlds.emoji.cases import CATEGORIES, caption_scenes, inpaint_cases, prompt_cases, question_cases
from unidiff.worlds.emoji.evaluation import profile_of
from unidiff.worlds.emoji.judge import EmojiEval, yardstick
from unidiff.worlds.emoji.model import Hole, PipelineModel
from unidiff.worlds.emoji.scenes import KINDS, render_batch

QUALITY = {
    "text_to_image": "text_to_image",
    "caption": "caption_exact",
    "answer": "answer_accuracy",
    "inpaint": "inpainting",
    "generate": "joint_agreement",
}
_PICTURES, _TEXTS = (
    ("model", "passes-16", REFERENCE),
    ("model", "threshold-0.5", "threshold-0.7", "passes-8", REFERENCE),
)
_HOLES = ("model", "passes-2", "passes-3", "passes-8", REFERENCE)
SWEEP = dict(zip(QUALITY, (_PICTURES, _TEXTS, _TEXTS, _HOLES, _PICTURES), strict=True))
"""Texts and holes are shorter than 32 tokens, so that 32 passes are 64."""


def judged_tasks() -> JudgedTasks:
    """What `unidiff.evaluation.benchmark.trained` asks of this world; joint generation is measured when asked for."""
    usual = tuple(task for task in QUALITY if task != "generate")
    return JudgedTasks(QUALITY, usual, SWEEP, judge, decode, yardstick)


def cases_per_part(task: str, cases: int) -> int:
    """EmojiEval's n for which a task has at least so many cases: it counts per category, and per kind of scene."""
    return -(-cases // {"text_to_image": len(CATEGORIES), "caption": len(KINDS)}.get(task, 1))


def judge(pipe: UniDiffPipeline, task: str, cases: int, seed: int, batch: int, **options: Any) -> EvaluationReport:
    """EmojiEval's report of one task."""
    model = PipelineModel(pipe, batch, **options)
    judged = EmojiEval(model, profile_of(pipe), seed, cases_per_part(task, cases))
    return judged.run([task])


def decode(
    pipe: UniDiffPipeline,
    task: str,
    rows: int,
    seed: int,
    batch: int,
    on_output: Callable[[UniDiffOutput], Any],
    **options: Any,
) -> None:
    """Decode rows of a task, its categories and kinds in turn."""
    ask(PipelineModel(pipe, batch, on_output, **options), pipe, task, rows, seed)


def ask(model: PipelineModel, pipe: UniDiffPipeline, task: str, rows: int, seed: int) -> Any:
    """A model for so many rows of a task."""
    profile, seeds, each = profile_of(pipe), list(range(seed, seed + rows)), cases_per_part(task, rows)
    if task == "generate":
        return model.generate(seeds)
    if task == "text_to_image":
        drawn = [prompt_cases(c, each, seed, profile) for c in CATEGORIES]
        return model.text_to_image([case.prompt for turn in zip(*drawn, strict=True) for case in turn][:rows], seeds)
    if task == "caption":
        seen = [caption_scenes(kind, each, seed, profile) for kind in KINDS]
        scenes = [scene for turn in zip(*seen, strict=True) for scene in turn][:rows]
        return model.caption(render_batch(scenes, profile), seeds)
    if task == "answer":
        asked = question_cases(rows, seed, profile)
        return model.answer(render_batch([c.scene for c in asked], profile), [c.question for c in asked], seeds)
    torn = inpaint_cases(rows, seed, profile)
    masks = torch.stack([profile.boxes([c.hole]) for c in torn])
    holes = [Hole(c.before, c.name, c.after) for c in torn]
    return model.inpaint(render_batch([c.scene for c in torn], profile), masks, holes, seeds)
