"""`unidiff eval emoji`: the whole of EmojiEval and the metrics, for one pipeline."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from unidiff.evaluation.benchmark.trials import REFERENCE, JudgedTasks
from unidiff.evaluation.kept import KeptRows
from unidiff.evaluation.metrics.base import CaptionedPictures
from unidiff.evaluation.report import EvaluationReport, Measure
from unidiff.pipeline import UniDiffPipeline
from unidiff.worlds.asked import PipelineModel
from unidiff.worlds.emoji.cases import (
    CATEGORIES,
    HELD_OUT,
    caption_scenes,
    inpaint_cases,
    phrasings,
    prompt_cases,
    question_cases,
    stated,
    task_seed,
    wrong_captions,
)
from unidiff.worlds.emoji.features import reader_network
from unidiff.worlds.emoji.judge import TASKS, EmojiEval, yardstick
from unidiff.worlds.emoji.language import (
    caption_distribution,
    caption_entropy,
    draw_caption,
    facts_correct,
)
from unidiff.worlds.emoji.oracle import Oracle
from unidiff.worlds.emoji.scenes import KINDS, Profile, Scene, SceneGenerator, get_profile, render_batch
from unidiff.worlds.emoji.second_reader import compare_readers
from unidiff.worlds.judging import Examination, examine

SECOND = "second_reader"
"""Reads the pictures of `text_to_image` again, so it needs that task."""
ALL_TASKS = (*TASKS, SECOND, "likelihood")
"""What runs where nothing is asked for; other metrics run when they are named."""
DISTRACTORS = 10
"""Wrong captions beside each right one, for metrics."""
QUICK = 300
"""Cases per category."""
PARTS = {"reader": len(KINDS), "text_to_image": len(CATEGORIES) + 1, "caption": len(KINDS)}
"""Categories of the tasks that have more than one."""


def run_emoji_eval(
    pipe: UniDiffPipeline,
    seed: int = 0,
    n: int = QUICK,
    per_task: int | None = None,
    tasks: Sequence[str] | None = None,
    batch_size: int = 64,
    profile: Profile | None = None,
    tick: Callable[..., None] = lambda more, total=None, what="": None,
    kept: KeptRows | None = None,
    **options: Any,
) -> EvaluationReport:
    """Evaluate a pipeline on emoji scenes.

    Args:
        pipe: trained on a profile of the emoji scenes. profile: by default the one of its picture size.
        seed: of scenes, prompts, questions, masks and decodes.
        n: cases of every category, and of every task without categories.
        per_task: in place of `n`, at least so many cases of every task, spread evenly over its categories; the full
            yardstick has 2,000.
        tasks: some of `ALL_TASKS`, and names of metrics; by default all that the pipeline can do, and the report says which are left out.
        batch_size: rows per decode; results do not depend on it.
        tick: called with how many more cases are done, of how many, and what comes next, see `World`.
        kept: rows and numbers of the same evaluation that need not be made again.
        options: for every decode, for instance `steps`; by default the pipeline's own settings for each task.

    Raises:
        ValueError: an unknown task, n or per_task below 1, or a pipeline whose pictures fit no profile.
    """
    if tasks is not None and SECOND in tasks and "text_to_image" not in tasks:
        raise ValueError("the task second_reader reads the pictures of text_to_image again; ask for both")
    chosen = profile or profile_of(pipe)

    def read_again(judge: EmojiEval) -> None:
        judge.progress("second reader")
        prompts, pictures = zip(*judge.drawn, strict=True)
        compare_readers(prompts, torch.stack(pictures), chosen, judge.report)

    of = Examination(
        lambda model, progress: EmojiEval(model, chosen, seed, n, progress),
        tuple(task for task in TASKS if task != "reader"),
        PARTS,
        lambda count: captions(count, seed, chosen, batch_size),
        measure_of,
        ALL_TASKS,
        {SECOND: read_again},
    )
    return examine(pipe, of, n, per_task, tasks, batch_size, tick, kept, options)


def captioned_scenes(n: int, seed: int, profile: Profile) -> list[tuple[Scene, str]]:
    """Scenes in the mix of the training split, each with one caption from its exact distribution."""
    generator = SceneGenerator(profile, task_seed("likelihood", seed))
    scenes = [generator.scene(i) for i in range(n)]
    return [(scene, draw_caption(scene, random.Random(f"likelihood|{seed}|{i}"))) for i, scene in enumerate(scenes)]


def captions(n: int, seed: int, profile: Profile, batch_size: int = 64) -> CaptionedPictures:
    """Fresh scenes for metrics, with captions whose surprise and entropy are known exactly."""
    cases = captioned_scenes(n, seed, profile)
    return CaptionedPictures(
        [caption for _, caption in cases],
        lambda start, stop: render_batch([scene for scene, _ in cases[start:stop]], profile),
        [-math.log(caption_distribution(scene)[caption]) for scene, caption in cases],
        [caption_entropy(scene) for scene, _ in cases],
        [
            wrong_captions(caption, scene, profile.names, DISTRACTORS, random.Random(f"retrieval|{seed}|{i}"))
            for i, (scene, caption) in enumerate(cases)
        ],
        *(seed, batch_size, reader_network(profile)),
        prompts=[case.prompt for case in prompt_cases(HELD_OUT, n, seed, profile)],
        phrasings=list(phrasings())[:n],
        shows=lambda texts, pictures: shown(texts, pictures, profile),
    )


def shown(texts: Sequence[str], pictures: Tensor, profile: Profile) -> list[bool]:
    """Whether the oracle reads the whole of each picture and finds in it what the text says."""
    pairs = zip(texts, Oracle(profile).read(pictures), strict=True)
    return [any(facts_correct(facts, r.scene) for facts in stated(text)) for text, r in pairs]


def oracle_reward(
    pipe: UniDiffPipeline, seed: int, kinds: Sequence[float] | None = None
) -> tuple[Callable[[list[str], Tensor], Tensor], Callable[[int], str]]:
    """1 where the oracle reads the whole picture and finds in it what the prompt says; and prompts by number.

    Args:
        seed: of the prompts. kinds: shares of the kinds of scenes that they are of; None for the profile's own.
    """
    profile = profile_of(pipe)
    changes: dict[str, Any] = {} if kinds is None else {"kinds": tuple(kinds)}
    scenes = SceneGenerator(replace(profile, **changes), seed)

    def reward(texts: list[str], pictures: Tensor) -> Tensor:
        return torch.tensor(shown(texts, pictures, profile), dtype=torch.float32)

    return reward, lambda number: draw_caption(scenes.scene(number), scenes.rng(number, "texts"))


def profile_of(pipe: UniDiffPipeline) -> Profile:
    """The profile whose pictures are as large as the pipeline's. Raises `ValueError`: there is none."""
    profiles = [get_profile(name) for name in ("cpu", "gpu")]
    for profile in profiles:
        if pipe.image_size == (profile.image_size, profile.image_size):
            return profile
    known = " or ".join(f"{p.image_size}x{p.image_size}" for p in profiles)
    raise ValueError(
        f"EmojiEval scores models of {known} pictures, this one makes {pipe.image_size[1]}x{pipe.image_size[0]}; "
        "name a profile that fits"
    )


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
    return EmojiEval(model, profile_of(pipe), seed, cases_per_part(task, cases)).run([task])


def decode(
    pipe: UniDiffPipeline, task: str, rows: int, seed: int, batch: int, on_output: Callable[..., Any], **options: Any
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
    return model.inpaint(render_batch([c.scene for c in torn], profile), masks, torn, seeds)


_UNFILLED = "of rows without the end-of-text fill (training may never have shown such rows)"
_WORDS = {
    "oracle_true": "true scenes read exactly by the oracle",
    "oracle_reconstruction": "objects read in the image tokenizer's reconstructions",
    "oracle_reconstruction_scene": "whole scenes read in reconstructions",
    "reconstruction_psnr": "PSNR of reconstructions, dB",
    "sprite_psnr": "PSNR inside sprites, dB",
    "text_to_image": "mean of the six categories",
    "caption_exact": "captions that are right",
    "answer_accuracy": "answers that are right",
    "answer_baseline": "best constant answer for each kind of question",
    "answers.exists": "\u201cis there a \u2026?\u201d",
    "answers.number": "\u201chow many \u2026 are there?\u201d",
    "answers.colour": "\u201cwhat colour is the background?\u201d",
    "answers.what": "\u201cwhat is in the picture?\u201d",
    "answers.related": "\u201cis the \u2026 left of the \u2026?\u201d",
    "answers.where": "\u201cwhere is the \u2026?\u201d",
    "answers.side": "\u201cwhat is at the top?\u201d",
    "inpainting": "picture and caption right, nothing else touched",
    "inpainting_there": "the named object stands in the hole",
    "inpainting_agrees": "caption agrees with the picture",
    "inpainting_untouched": "what was given is unchanged",
    "joint_agreement": "caption agrees with the picture",
    "joint_distinct": "distinct scenes, as a share of the data's",
    "joint_entropy": "entropy of the objects, as a share of the data's",
    "shuffled_composition": "compositions judged by another prompt (a check of the judge)",
    "caption_nelbo": "NELBO of captions given the picture, nats",
    "caption_entropy": "entropy of captions given the picture, nats: the least that is possible",
    "free_phrasing": "pictures of prompts as people might write them",
    "caption_gap": "NELBO of captions above the entropy, nats",
    "caption_nelbo_words": f"NELBO of captions, nats, {_UNFILLED}",
    "image_nelbo": "NELBO of pictures given the caption, nats",
    "joint_nelbo": "joint NELBO, nats",
    "joint_nelbo_text": "joint NELBO, the part of the captions, nats",
    "joint_nelbo_image": "joint NELBO, the part of the pictures, nats",
    "joint_nelbo_words": f"joint NELBO, nats, {_UNFILLED}",
    "joint_nelbo_text_words": f"joint NELBO, the part of the captions, nats, {_UNFILLED}",
    "joint_nelbo_image_words": f"joint NELBO, the part of the pictures, nats, {_UNFILLED}",
    "readers.second_true": "true scenes read exactly by the second reader",
    "readers.same_judgement": "drawings that both readers judge alike",
    "readers.same_scene": "drawings that both readers read alike",
    "readers.contradiction": "drawings that the readers read differently",
    "readers.only_oracle_reads": "drawings that only the oracle can read",
    "readers.only_second_reads": "drawings that only the second reader can read",
    "readers.oracle_right": "drawings right by the oracle, all facts asked for",
    "readers.second_right": "drawings right by the second reader",
}
_LOWER = ("unreadable.", "shuffled_", "readers.contradiction", "readers.only_", "caption_gap")
_NEITHER = ("answer_baseline", "caption_entropy", "joint_distinct", "joint_entropy")
_HEADLINES = ("text_to_image", "caption_exact", "answer_accuracy", "inpainting", "joint_agreement")


def measure_of(task: str, key: str) -> Measure:
    """How the number of this key, which a task found, is shown."""
    group, _, last = key.rpartition(".")
    plain = last.replace("_", " ")
    words = _WORDS.get(key) or (f"{plain}: pictures that cannot be read" if group == "unreadable" else plain)
    neither = key in _NEITHER or key.endswith("_words")
    better = "" if neither else "lower" if key.startswith(_LOWER) or "nelbo" in key else "higher"
    return Measure(task, words, key in _HEADLINES, better)
