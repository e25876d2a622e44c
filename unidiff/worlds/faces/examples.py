"""What a person may ask of a model that was trained on faces, and the demo of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from unidiff.pipeline import UniDiffPipeline
from unidiff.pipelines.sheet import Cell
from unidiff.world import TaskExample
from unidiff.worlds.demo_page import Section, section_of, write_demo
from unidiff.worlds.faces.cases import case_faces, hole, hole_cases, question_cases
from unidiff.worlds.faces.evaluation import check_size
from unidiff.worlds.faces.language import draw_caption
from unidiff.worlds.faces.scenes import FaceGenerator, render

_SEED = 7
PROMPTS = (
    "a person with curly red hair, big blue eyes, a smile, a striped green shirt",
    "someone with dark skin, a full beard, sunglasses, a top hat",
    "a face with long blond hair, a grin, red glasses, a purple turtleneck",
    "a person with a bald head, a long beard, a red cap, a blue background",
    "someone with tan skin, blue braids, green eyes looking left, orange overalls",
    "a face with light skin, spiky black hair, a frown, no glasses, a yellow background",
    "a person with brown skin, black buns, wide brown eyes, an open mouth",
    "someone with a brown bob, a smile, black glasses, a checked red shirt",
    "a face with short black hair, a goatee, sunglasses, a gray background",
    "a person with light skin, long brown hair, a green beanie, a blue jumper",
    "someone with dark skin, curly black hair, blue eyes looking right, a grin, a pink wall",
    "a face with tan skin, no hair, a serious mouth, a big long beard, red glasses, a plain orange shirt",
)


def face_prompts() -> list[str]:
    """Sentences of the grammar."""
    return list(PROMPTS)


def task_examples(pipe: Any) -> list[TaskExample]:
    """Examples of all tasks; faces that training never saw."""
    found = [TaskExample("text_to_image", prompt) for prompt in PROMPTS[:6]]
    found += [TaskExample("caption", "", render(face)) for face in case_faces("examples", 4, _SEED)]
    found += [TaskExample("answer", case.question, render(case.face)) for case in _varied(_SEED, 5)]
    for case in hole_cases(4, _SEED):
        there = Image.fromarray(hole(case.facet).numpy())
        found.append(TaskExample("inpaint", case.template(pipe.texts.encode), render(case.face), there))
    return [
        *found,
        TaskExample("generate", ""),
        TaskExample("generate", "a person with <mask:3>, sunglasses, a top hat"),
    ]


def run_demo(pipe: UniDiffPipeline, out: str | Path, seed: int = 0) -> tuple[Path, Path]:
    """Draw, describe, answer and complete; write `demo.png` and `demo.html` into `out`, and return their paths.

    Raises:
        ValueError: the model's pictures are not of the size of faces.
    """
    check_size(pipe)
    return write_demo([make(pipe, seed) for make in (drawings, descriptions, answers, completions, inventions)], out)


def drawings(pipe: UniDiffPipeline, seed: int) -> Section:
    """Text to image."""
    result = pipe.text_to_image(face_prompts(), generator=seed, record_trajectory=True)
    cells = [Cell((image,), prompt) for image, prompt in zip(result.images, PROMPTS, strict=True)]
    return section_of("Text to image: drawn by the model", cells, ("drawn by the model",), result)


def descriptions(pipe: UniDiffPipeline, seed: int) -> Section:
    """Captions of faces that training never saw."""
    faces, rng = case_faces("demo", 8, seed), FaceGenerator(seed).rng(0, "demo")
    pictures = [render(face) for face in faces]
    result = pipe.caption(pictures, generator=seed)
    rows = zip(pictures, result.texts, faces, strict=True)
    cells = [Cell((picture,), text, f"a true caption: {draw_caption(face, rng)}") for picture, text, face in rows]
    return section_of("Captions: written by the model", cells, ("described as",), result)


def answers(pipe: UniDiffPipeline, seed: int) -> Section:
    """Answers to questions about pictures."""
    cases = _varied(seed, 8)
    pictures = [render(case.face) for case in cases]
    result = pipe.answer(pictures, [case.question for case in cases], generator=seed)
    rows = zip(pictures, cases, result.texts, strict=True)
    cells = [Cell((p,), f"{case.question} {text}", f"true answer: {case.answer}") for p, case, text in rows]
    return section_of("Answers to questions", cells, ("asked about",), result)


def completions(pipe: UniDiffPipeline, seed: int) -> Section:
    """A picture and its caption completed together: the same facet is hidden in both."""
    cases = hole_cases(6, seed)
    pictures, masks = [render(case.face) for case in cases], [hole(case.facet).numpy() for case in cases]
    templates = [case.template(pipe.texts.encode) for case in cases]
    result = pipe.inpaint(pictures, masks, templates, generator=seed, record_trajectory=True)
    pairs = zip(masks, pictures, strict=True)
    torn = [Image.fromarray(np.where(m[..., None], np.uint8(128), np.asarray(p))) for m, p in pairs]
    rows = zip(torn, result.images, pictures, result.texts, templates, strict=True)
    cells = [Cell(tuple(shown), text, f"from: {template}") for *shown, text, template in rows]
    title = "Joint inpainting: the hole, what the model made of picture and words together, and the original"
    return section_of(title, cells, ("with a hole", "completed by the model", "the original"), result)


def inventions(pipe: UniDiffPipeline, seed: int) -> Section:
    """Picture and caption from nothing."""
    result = pipe.generate(num_images_per_prompt=8, generator=seed)
    cells = [Cell((image,), text) for image, text in zip(result.images, result.texts, strict=True)]
    return section_of("Joint generation: words and picture from nothing", cells, ("invented",), result)


def _varied(seed: int, amount: int) -> Sequence[Any]:
    """Questions of kinds that differ."""
    return question_cases(3 * amount, seed)[::3]
