"""`unidiff eval emoji`: the whole of EmojiEval for one pipeline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from unidiff.evaluation.likelihood_eval import evaluate_likelihood
from unidiff.evaluation.report import Report
from unidiff.pipeline import UniDiffPipeline
from unidiff.worlds.emoji.cases import CATEGORIES
from unidiff.worlds.emoji.judge import TASKS, EmojiEval
from unidiff.worlds.emoji.model import PipelineModel
from unidiff.worlds.emoji.scenes import KINDS, Profile, get_profile
from unidiff.worlds.emoji.second_reader import compare_readers

ALL_TASKS = (*TASKS, "second_reader", "likelihood")
"""`second_reader` reads the pictures of `text_to_image` again, so it needs that task."""
QUICK = 300
"""Cases per category."""
_PARTS = {"reader": len(KINDS), "text_to_image": len(CATEGORIES) + 1, "caption": len(KINDS)}
"""Categories of the tasks that have more than one."""


def run_emoji_eval(
    pipe: UniDiffPipeline,
    seed: int = 0,
    n: int = QUICK,
    per_task: int | None = None,
    tasks: Sequence[str] = ALL_TASKS,
    batch_size: int = 64,
    profile: Profile | None = None,
    progress: Callable[[str], None] | None = None,
    **options: Any,
) -> Report:
    """Evaluate a pipeline on emoji scenes.

    Args:
        pipe: trained on a profile of the emoji scenes.
        seed: of scenes, prompts, questions, masks and decodes; another seed gives others.
        n: cases of every category, and of every task without categories.
        per_task: in place of `n`, at least so many cases of every task, spread evenly over its categories; the full
            yardstick has 2,000.
        tasks: some of `ALL_TASKS`.
        batch_size: rows per decode; results do not depend on it.
        profile: which scenes; by default the one of the pipeline's picture size.
        progress: called with what is done next.
        options: for every decode, for instance `steps`; by default the pipeline's own settings for each task.

    Raises:
        ValueError: an unknown task, n or per_task below 1, or a pipeline whose pictures fit no profile.
    """
    if per_task is not None and per_task < 1:
        raise ValueError(f"per_task is {per_task}; an evaluation needs at least one case")
    if unknown := [task for task in tasks if task not in ALL_TASKS]:
        raise ValueError(f"unknown task {unknown[0]!r}; expected some of {', '.join(ALL_TASKS)}")
    if "second_reader" in tasks and "text_to_image" not in tasks:
        raise ValueError("the task second_reader reads the pictures of text_to_image again; ask for both")
    profile = profile or profile_of(pipe)
    say = progress or (lambda what: None)
    start = perf_counter()
    hidden_bar = getattr(pipe, "_progress_bar_config", {})
    pipe.set_progress_bar_config(**{**hidden_bar, "disable": True})
    prompts: list[str] = []
    drawn: list[Tensor] = []  # uint8 [B, 3, H, W]

    def keep(words: Sequence[str], images: Tensor) -> None:
        prompts.extend(words)
        drawn.append((images * 255 + 0.5).clamp(0, 255).to(torch.uint8))

    try:
        model = PipelineModel(pipe, batch_size, keep if "second_reader" in tasks else None, **options)
        judge = EmojiEval(model, profile, seed, n, say)
        for task in (task for task in TASKS if task in tasks):
            judge.n = _cases(task, n, per_task)
            judge.run([task])
        report = judge.report
        if drawn:
            say("second reader")
            compare_readers(prompts, torch.cat(drawn).movedim(1, -1), profile, report)
        if "likelihood" in tasks:
            say("likelihoods")
            evaluate_likelihood(pipe, profile, report, seed, _cases("likelihood", n, per_task), batch_size=batch_size)
    finally:
        pipe.set_progress_bar_config(**hidden_bar)
    report.about |= {"n": n} if per_task is None else {"n": None, "per_task": per_task}
    report.about |= {name: value for name, value in options.items() if isinstance(value, int | float | str)}
    report.about["parameters"] = sum(p.numel() for p in pipe.transformer.parameters())
    report.add("seconds", perf_counter() - start)
    return report


def _cases(task: str, n: int, per_task: int | None) -> int:
    """Cases of each category of a task."""
    return n if per_task is None else -(-per_task // _PARTS.get(task, 1))


def profile_of(pipe: UniDiffPipeline) -> Profile:
    """The profile whose pictures are as large as the pipeline's.

    Raises:
        ValueError: there is none.
    """
    profiles = [get_profile(name) for name in ("cpu", "gpu")]
    for profile in profiles:
        if pipe.image_size == (profile.image_size, profile.image_size):
            return profile
    known = " or ".join(f"{p.image_size}x{p.image_size}" for p in profiles)
    raise ValueError(
        f"EmojiEval scores models of {known} pictures, this one makes {pipe.image_size[1]}x{pipe.image_size[0]}; "
        "name a profile that fits"
    )
