"""What a person may ask of a model that was trained on emoji scenes."""

from __future__ import annotations

from typing import Any

from PIL import Image

from unidiff.world import TaskExample
from unidiff.worlds.emoji.cases import caption_scenes, inpaint_cases, question_cases
from unidiff.worlds.emoji.demo import demo_prompts, picture_of
from unidiff.worlds.emoji.scenes import get_profile

_SEED = 7


def task_examples(pipe: Any) -> list[TaskExample]:
    """Examples of all tasks; scenes that training never saw."""
    profile = get_profile("cpu", image_size=pipe.image_size[0])
    found = [TaskExample("text_to_image", prompt) for prompt in demo_prompts()[:6]]
    for kind in ("single", "pair", "count", "group"):
        found += [TaskExample("caption", "", picture_of(s, profile)) for s in caption_scenes(kind, 1, _SEED, profile)]
    cases = question_cases(5, _SEED, profile)
    found += [TaskExample("answer", case.question, picture_of(case.scene, profile)) for case in cases]
    for case in [case for case in inpaint_cases(8, _SEED, profile) if case.name][:4]:
        hole = Image.fromarray(profile.boxes([case.hole]).numpy())
        words = case.template(pipe.texts.encode)
        found.append(TaskExample("inpaint", words, picture_of(case.scene, profile), hole))
    return [*found, TaskExample("generate", ""), TaskExample("generate", "a fox <mask:4> background")]
