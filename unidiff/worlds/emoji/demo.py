"""`unidiff demo`: everything the embedded model does, on one sheet and on one page."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from unidiff.pipeline import UniDiffPipeline
from unidiff.pipelines.sheet import Cell
from unidiff.worlds.demo_page import Section, section_of, write_demo
from unidiff.worlds.emoji.cases import caption_scenes, inpaint_cases, question_cases
from unidiff.worlds.emoji.language import draw_caption
from unidiff.worlds.emoji.scenes import LARGE, MEDIUM, SMALL, Profile, Scene, SceneObject, get_profile, render

# Sentences of the training grammar, each with one scene that it describes: background, size, and what is where.
_DRAWN: tuple[tuple[Any, ...], ...] = (
    ("a fox on a green background", "green", LARGE, ("fox", 2, 2)),
    ("a dog face in the top left corner on a white background", "white", LARGE, ("dog face", 0, 0)),
    ("a picture of an octopus on a blue background", "blue", LARGE, ("octopus", 2, 3)),
    ("a red apple in the bottom right corner on gray", "gray", LARGE, ("red apple", 4, 4)),
    ("a small rose in the centre on a yellow background", "yellow", MEDIUM, ("rose", 3, 2)),
    ("an image of a pizza at the top on a purple background", "purple", LARGE, ("pizza", 0, 2)),
    ("an owl to the left of a cactus on a red background", "red", LARGE, ("owl", 2, 0), ("cactus", 2, 4)),
    ("a rocket above a house on black", "black", LARGE, ("rocket", 0, 2), ("house", 4, 2)),
    ("two frogs on a green background", "green", MEDIUM, ("frog", 0, 0), ("frog", 4, 4)),
    ("three penguins against a red background", "red", MEDIUM, *[("penguin", *at) for at in ((0, 0), (0, 4), (4, 0))]),
    (
        *("five lemons on a blue background", "blue", SMALL),
        *[("lemon", *at) for at in ((0, 0), (0, 6), (3, 3), (6, 0), (6, 6))],
    ),
    (
        *("two tulips and a banana with a black background", "black", MEDIUM),
        *(("tulip", 0, 0), ("tulip", 0, 4), ("banana", 4, 4)),
    ),
)
PROMPTS: tuple[tuple[str, Scene], ...] = tuple(
    (prompt, Scene(tuple(SceneObject(name, row, col, size) for name, row, col in placed), ground))
    for prompt, ground, size, *placed in _DRAWN
)


def demo_prompts() -> list[str]:
    return [prompt for prompt, _ in PROMPTS]


def run_demo(pipe: UniDiffPipeline, out: str | Path, seed: int = 0) -> tuple[Path, Path]:
    """Draw, describe, answer and complete; write `demo.png` and `demo.html` into `out`, and return their paths.

    Args:
        pipe: a model trained on emoji scenes. seed: of the pictures, the questions and the decodes.

    Raises:
        ValueError: the model's pictures are not square with a side that 8 divides.
    """
    height, width = pipe.image_size
    if height != width or height % 8:
        raise ValueError(f"the demo needs square pictures with a side that 8 divides; the model draws {width}x{height}")
    profile = get_profile("cpu", image_size=height)  # what the embedded model was trained on
    sections = [make(pipe, profile, seed) for make in (drawings, descriptions, answers, completions, inventions)]
    return write_demo(sections, out)


def drawings(pipe: UniDiffPipeline, profile: Profile, seed: int) -> Section:
    """Text to image, with a true scene beside each."""
    result = pipe.text_to_image(demo_prompts(), generator=seed, record_trajectory=True)
    pairs = zip(result.images, PROMPTS, strict=True)
    cells = [Cell((image, picture_of(scene, profile)), prompt) for image, (prompt, scene) in pairs]
    title = "Text to image: drawn by the model, and a true scene beside it"
    return section_of(title, cells, ("drawn by the model", "a true scene"), result)


def descriptions(pipe: UniDiffPipeline, profile: Profile, seed: int) -> Section:
    """Captions of scenes that training never saw."""
    kinds = {"single": 4, "count": 1, "pair": 2, "group": 1}
    scenes = [scene for kind, n in kinds.items() for scene in caption_scenes(kind, n, seed, profile)]
    pictures = [picture_of(scene, profile) for scene in scenes]
    result = pipe.caption(pictures, generator=seed)
    truth = [draw_caption(scene, random.Random(f"demo caption|{seed}|{i}")) for i, scene in enumerate(scenes)]
    rows = zip(pictures, result.texts, truth, strict=True)
    cells = [Cell((picture,), text, f"a true caption: {said}") for picture, text, said in rows]
    return section_of("Captions: written by the model", cells, ("described as",), result)


def answers(pipe: UniDiffPipeline, profile: Profile, seed: int) -> Section:
    """Answers to questions about pictures."""
    cases = question_cases(8, seed, profile)
    pictures = [picture_of(case.scene, profile) for case in cases]
    result = pipe.answer(pictures, [case.question for case in cases], generator=seed)
    rows = zip(pictures, cases, result.texts, strict=True)
    cells = [Cell((p,), f"{case.question} {text}", f"true answer: {case.answer}") for p, case, text in rows]
    return section_of("Answers to questions", cells, ("asked about",), result)


def completions(pipe: UniDiffPipeline, profile: Profile, seed: int) -> Section:
    """A picture and its caption completed together: each holds what the other lacks."""
    cases = [case for case in inpaint_cases(16, seed, profile) if case.name][:6]
    pictures = [picture_of(case.scene, profile) for case in cases]
    masks = [profile.boxes([case.hole]).numpy() for case in cases]
    templates = [case.template(pipe.texts.encode) for case in cases]
    result = pipe.inpaint(pictures, masks, templates, generator=seed, record_trajectory=True)
    torn = [Image.fromarray(np.where(m[..., None], np.uint8(128), np.asarray(p))) for m, p in zip(masks, pictures)]
    rows = zip(torn, result.images, pictures, result.texts, templates, strict=True)
    cells = [Cell(tuple(shown), text, f"from: {template}") for *shown, text, template in rows]
    title = "Joint inpainting: the hole, what the model made of picture and words together, and the original"
    return section_of(title, cells, ("with a hole", "completed by the model", "the original"), result)


def inventions(pipe: UniDiffPipeline, profile: Profile, seed: int) -> Section:
    """Picture and caption from nothing."""
    result = pipe.generate(num_images_per_prompt=8, generator=seed)
    cells = [Cell((image,), text) for image, text in zip(result.images, result.texts, strict=True)]
    return section_of("Joint generation: words and picture from nothing", cells, ("invented",), result)


def picture_of(scene: Scene, profile: Profile) -> Image.Image:
    return Image.fromarray(render(scene, profile))
