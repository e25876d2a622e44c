"""EmojiEval: what a model draws, says, answers and repaints, judged by an exact oracle."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unidiff.evaluation.report import Estimate, EvaluationReport, sources_hash
from unidiff.worlds.asked import Drawn, PipelineModel, bytes_of
from unidiff.worlds.emoji.cases import (
    CATEGORIES,
    HELD_OUT,
    caption_scenes,
    inpaint_cases,
    prompt_cases,
    question_cases,
    scenes,
    task_seed,
)
from unidiff.worlds.emoji.language import draw_caption, facts_correct, parse_caption, zone
from unidiff.worlds.emoji.oracle import Oracle, Reading
from unidiff.worlds.emoji.scenes import ATLAS_FOLDER, KINDS, LARGE, Profile, Scene, render_batch
from unidiff.worlds.judging import Judging

TASKS = ("reader", "text_to_image", "caption", "answer", "inpaint", "generate")
"""Parts of the evaluation, each of which can be left out."""


@dataclass
class EmojiEval(Judging):
    """One evaluation: who is judged, on what, and what came out.

    Args:
        model: who is judged. profile: pictures and objects.
        seed: of scenes, prompts and decodes. n: cases per category and task.
        progress: told what comes next.
        drawn: prompts, and the pictures that were drawn for them, uint8 `[H, W, 3]`.
    """

    model: PipelineModel
    profile: Profile
    seed: int = 0
    n: int = 300
    progress: Callable[[str], None] = lambda what: None
    report: EvaluationReport = field(default_factory=EvaluationReport)
    drawn: list[tuple[str, Tensor]] = field(default_factory=list, init=False)

    tasks = TASKS

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"n is {self.n}; an evaluation needs at least one case")
        self.oracle = Oracle(self.profile)

    def about(self) -> dict[str, Any]:
        return {"profile": self.profile.name, "yardstick": yardstick()}

    def describe(self, reading: Reading) -> str:
        return describe(reading)

    def seed_of(self, task: str) -> int:
        return task_seed(task, self.seed)

    def run(self, tasks: Sequence[str] = TASKS) -> EvaluationReport:
        return super().run(tasks)

    def run_reader(self) -> None:
        """The oracle on true pictures and on what is left of them after the tokenizer."""
        self.progress("oracle")
        truth = scenes("oracle", KINDS, 4 * self.n, self.seed, self.profile, "all")
        pictures = render_batch(truth, self.profile)
        rebuilt = self.model.reconstruct(pictures)
        seen, kept = self.oracle.read(pictures), self.oracle.read(rebuilt)
        self.share("oracle_true", [r.scene == s for r, s in zip(seen, truth)])
        self.share("oracle_reconstruction", [item in r.objects for r, s in zip(kept, truth) for item in s.objects])
        self.share("oracle_reconstruction_scene", [r.scene == s for r, s in zip(kept, truth)])
        errors = (rebuilt.clamp(0, 1) - pictures).square().mean(1)  # [B, H, W]
        inside = torch.stack([self.profile.boxes(s.objects) for s in truth])
        for key, own in (("reconstruction_psnr", errors), ("sprite_psnr", errors[inside])):
            self.report.add(key, -10 * math.log10(max(float(own.mean()), 1e-10)))

    def run_text_to_image(self) -> None:
        """Pictures from prompts: every stated fact true, nothing else there, nothing unreadable."""
        scores = []
        for category in (*CATEGORIES, HELD_OUT):
            cases = prompt_cases(category, self.n, self.seed, self.profile)
            self.progress(f"text-to-image, {category}")
            prompts = [c.prompt for c in cases]
            seeds = self.seeds(category, len(cases))
            images = self.model.text_to_image(prompts, seeds)
            self.drawn += zip(prompts, bytes_of(images), strict=True)
            readings = self.oracle.read(images)
            if category == "background":
                right = [r.background == c.facts.background for c, r in zip(cases, readings)]
            else:
                right = [facts_correct(c.facts, r.scene) for c, r in zip(cases, readings)]
            self.look("text_to_image", category, seeds, right, asked=prompts, seen=readings, drawn=images)
            score = self.share(HELD_OUT if category == HELD_OUT else f"categories.{category}", right)
            scores += [score] if category != HELD_OUT else []
            self.share(f"unreadable.{category}", [r.scene is None for r in readings])
            if category == "composition" and self.n > 1:
                swapped = zip([*cases[1:], cases[0]], readings)
                self.share("shuffled_composition", [facts_correct(c.facts, r.scene) for c, r in swapped])
        self.report.add("text_to_image", Estimate.average(scores))

    def run_caption(self) -> None:
        """Captions: in the grammar, everything named is true, no object left out."""
        right: list[bool] = []
        for kind in KINDS:
            truth = caption_scenes(kind, self.n, self.seed, self.profile)
            self.progress(f"captions, {kind}")
            pictures, seeds = render_batch(truth, self.profile), self.seeds(f"caption {kind}", len(truth))
            texts = self.model.caption(pictures, seeds)
            these = self._true(texts, truth)
            known = [
                draw_caption(scene, random.Random(f"true caption|{self.seed}|{i}")) for i, scene in enumerate(truth)
            ]
            self.look("caption", kind, seeds, these, wrote=texts, expected=known, given=pictures)
            self.share(f"captions.{kind}", these)
            right += these
        self.share("caption_exact", right)

    def run_answer(self) -> None:
        """Answers, word for word; and how far the best constant answer of each kind of question gets."""
        cases = question_cases(self.n, self.seed, self.profile)
        self.progress("answers")
        pictures = render_batch([c.scene for c in cases], self.profile)
        questions, known, seeds = (
            [c.question for c in cases],
            [c.answer for c in cases],
            self.seeds("answer", len(cases)),
        )
        texts = self.model.answer(pictures, questions, seeds)
        right = [t.strip() == c.answer for t, c in zip(texts, cases)]
        kinds = [c.kind for c in cases]
        self.look("answer", kinds, seeds, right, asked=questions, wrote=texts, expected=known, given=pictures)
        self.answered(kinds, known, right)

    def run_inpaint(self) -> None:
        """Holes: the repainted picture and the completed caption agree, and nothing given was touched."""
        cases = inpaint_cases(self.n, self.seed, self.profile)
        self.progress("inpainting")
        pictures = render_batch([c.scene for c in cases], self.profile)
        masks = torch.stack([self.profile.boxes([c.hole]) for c in cases])
        seeds = self.seeds("inpaint", len(cases))
        out = self.model.inpaint(pictures, masks, cases, seeds)
        readings, agrees = self._agreement(out)
        same = lambda o, hole: o.overlaps(hole) and o.name == hole.name  # noqa: E731
        there = [any(same(o, c.hole) for o in r.objects) for c, r in zip(cases, readings)]
        whole = [a and b and c for a, b, c in zip(there, agrees, out.untouched)]
        torn = torch.where(masks[:, None], 0.5, pictures)
        asked = [f"{c.before}\u2026{c.after}" if c.name else c.caption for c in cases]
        kinds, known = (
            ["a word hidden too" if c.name else "whole caption given" for c in cases],
            [c.caption for c in cases],
        )
        shown = {"wrote": out.texts, "seen": readings, "expected": known, "given": torn, "drawn": out.images}
        self.look("inpaint", kinds, seeds, whole, asked=asked, **shown)
        for key, values in (("", whole), ("_there", there), ("_agrees", agrees), ("_untouched", out.untouched)):
            self.share(f"inpainting{key}", values)

    def run_generate(self) -> None:
        """Pictures with captions from nothing: they agree, and are as varied as training scenes."""
        self.progress("joint generation")
        seeds = self.seeds("joint", self.n)
        out = self.model.generate(seeds)
        readings, agrees = self._agreement(out)
        self.look("generate", "", seeds, agrees, wrote=out.texts, seen=readings, drawn=out.images)
        self.share("joint_agreement", agrees)
        truth = scenes("joint", KINDS, self.n, self.seed, self.profile)
        made = [r.scene for r in readings if r.scene is not None]
        self.report.add("joint_distinct", len(set(made)) / len(set(truth)))
        self.report.add("joint_entropy", object_entropy(made) / max(object_entropy(truth), 1e-9))

    def _true(self, texts: Sequence[str], truth: Sequence[Scene | None]) -> list[bool]:
        """Whether each text is a caption of its scene."""
        return [facts_correct(parse_caption(t, self.profile.names), s) for t, s in zip(texts, truth)]

    def _agreement(self, out: Drawn) -> tuple[list[Reading], list[bool]]:
        """What is on the pictures, and whether the texts say so."""
        readings = self.oracle.read(out.images)
        return readings, self._true(out.texts, [r.scene for r in readings])


def describe(reading: Reading) -> str:
    """What a reader saw, in words."""
    named = [f"{'' if item.size == LARGE else 'small '}{item.name} ({zone(item)})" for item in reading.objects]
    if reading.unreadable:
        named.append(f"{reading.unreadable} unreadable {'part' if reading.unreadable == 1 else 'parts'}")
    return f"{', '.join(named) or 'nothing'}; {reading.background or 'no'} background"


def object_entropy(made: Sequence[Scene]) -> float:
    """Entropy in nats of the names of all objects in some scenes; 0 for none."""
    counts = Counter(item.name for scene in made for item in scene.objects)
    total = sum(counts.values())
    return -sum(n / total * math.log(n / total) for n in counts.values())


def yardstick() -> str:
    """SHA-256 over atlas, generator, grammar, split, cases, oracle and judgement: the same yardstick, the same hash."""
    names = ("scenes", "language", "oracle", "cases", "judge")
    files = [Path(__file__).with_name(f"{name}.py") for name in names]
    return sources_hash([*files, *(ATLAS_FOLDER / f"atlas.{kind}" for kind in ("json", "png"))])
