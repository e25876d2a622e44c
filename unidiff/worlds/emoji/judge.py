"""EmojiEval: what a model draws, says, answers and repaints, judged by an exact oracle."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

import unidiff.worlds.emoji.atlas as atlas_module
from unidiff.diffusion.noise import keyed_bits
from unidiff.evaluation.report import Estimate, Report, sources_hash
from unidiff.worlds.emoji.cases import (
    CATEGORIES,
    HELD_OUT,
    PromptCase,
    caption_scenes,
    inpaint_cases,
    prompt_cases,
    question_cases,
    scenes,
    task_seed,
)
from unidiff.worlds.emoji.model import EvalModel, Hole
from unidiff.worlds.emoji.oracle import Oracle, Reading
from unidiff.worlds.emoji.parse import facts_correct, parse_caption
from unidiff.worlds.emoji.scenes import KINDS, Profile, Scene
from unidiff.worlds.emoji.table import render_batch

TASKS = ("reader", "text_to_image", "caption", "answer", "inpaint", "joint")
"""Parts of the evaluation, each of which can be left out; `likelihood` needs the weights and lives in its own file."""

Progress = Callable[[str], None]


@dataclass
class EmojiEval:
    """One evaluation: who is judged, on what, and what came out.

    Args:
        model: who is judged.
        profile: pictures and objects.
        seed: of scenes, prompts and decodes.
        n: cases per category and task.
        progress: told what comes next.
    """

    model: EvalModel
    profile: Profile
    seed: int = 0
    n: int = 300
    progress: Progress = lambda what: None
    report: Report = field(default_factory=Report)

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"n is {self.n}; an evaluation needs at least one case")
        self.oracle = Oracle(self.profile)

    def run(self, tasks: Sequence[str] = TASKS) -> Report:
        """Run the named parts; each adds its numbers to the report."""
        if unknown := [t for t in tasks if t not in TASKS]:
            raise ValueError(f"unknown task {unknown[0]!r}; expected some of {', '.join(TASKS)}")
        start = time.perf_counter()
        self.report.about |= {"seed": self.seed, "n": self.n, "profile": self.profile.name, "yardstick": yardstick()}
        for task in tasks:
            getattr(self, f"run_{task}")()
        self.report.add("seconds", self.report.values.get("seconds", 0.0) + time.perf_counter() - start)
        return self.report

    def run_reader(self) -> None:
        """The oracle on true pictures and on what is left of them after the tokenizer."""
        self.progress("oracle")
        truth = scenes("oracle", KINDS, 4 * self.n, self.seed, self.profile, "all")
        pictures = self._pictures(truth)
        self.report.add("oracle_true", Estimate.share(r.scene == s for r, s in zip(self.oracle.read(pictures), truth)))
        rebuilt = self.model.reconstruct(pictures)
        readings = self.oracle.read(rebuilt)
        found = [item in r.objects for r, s in zip(readings, truth) for item in s.objects]
        self.report.add("oracle_reconstruction", Estimate.share(found))
        self.report.add("oracle_reconstruction_scene", Estimate.share(r.scene == s for r, s in zip(readings, truth)))
        errors = (rebuilt.clamp(0, 1) - pictures).square().mean(1)  # [B, H, W]
        inside = torch.stack([sprite_pixels(s, self.profile) for s in truth])
        self.report.add("reconstruction_psnr", -10 * math.log10(max(float(errors.mean()), 1e-10)))
        self.report.add("sprite_psnr", -10 * math.log10(max(float(errors[inside].mean()), 1e-10)))

    def run_text_to_image(self) -> None:
        """Pictures from prompts: every stated fact true, nothing else there, nothing unreadable."""
        scores = []
        for category in (*CATEGORIES, HELD_OUT):
            cases = prompt_cases(category, self.n, self.seed, self.profile)
            self.progress(f"text-to-image, {category}")
            seeds = self._seeds(category, len(cases))
            readings = self.oracle.read(self.model.text_to_image([c.prompt for c in cases], seeds))
            score = Estimate.share(_drawn_right(category, c, r) for c, r in zip(cases, readings))
            unreadable = Estimate.share(r.scene is None for r in readings)
            if category == HELD_OUT:
                self.report.add(HELD_OUT, score)
            else:
                self.report.add(f"categories.{category}", score)
                scores.append(score)
            self.report.add(f"unreadable.{category}", unreadable)
            if category == "composition" and self.n > 1:
                swapped = [*cases[1:], cases[0]]
                right = [facts_correct(c.facts, r.scene) for c, r in zip(swapped, readings)]
                self.report.add("shuffled_composition", Estimate.share(right))
        self.report.add("text_to_image", Estimate.average(scores))

    def run_caption(self) -> None:
        """Captions: in the grammar, everything named is true, no object left out."""
        right: list[bool] = []
        for kind in KINDS:
            truth = caption_scenes(kind, self.n, self.seed, self.profile)
            self.progress(f"captions, {kind}")
            texts = self.model.caption(self._pictures(truth), self._seeds(f"caption {kind}", len(truth)))
            these = [facts_correct(parse_caption(t, self.profile.names), s) for t, s in zip(texts, truth)]
            self.report.add(f"captions.{kind}", Estimate.share(these))
            right += these
        self.report.add("caption_exact", Estimate.share(right))

    def run_answer(self) -> None:
        """Answers, word for word; and how far the best constant answer of each kind of question gets."""
        cases = question_cases(self.n, self.seed, self.profile)
        self.progress("answers")
        seeds = self._seeds("answer", len(cases))
        texts = self.model.answer(self._pictures([c.scene for c in cases]), [c.question for c in cases], seeds)
        right = [t.strip() == c.answer for t, c in zip(texts, cases)]
        self.report.add("answer_accuracy", Estimate.share(right))
        common = 0
        for kind in sorted({c.kind for c in cases}):
            of_kind = [i for i, c in enumerate(cases) if c.kind == kind]
            self.report.add(f"answers.{kind}", Estimate.share(right[i] for i in of_kind))
            common += Counter(cases[i].answer for i in of_kind).most_common(1)[0][1]
        self.report.add("answer_baseline", common / len(cases))

    def run_inpaint(self) -> None:
        """Holes: the repainted picture and the completed caption agree, and nothing given was touched."""
        cases = inpaint_cases(self.n, self.seed, self.profile)
        self.progress("inpainting")
        out = self.model.inpaint(
            self._pictures([c.scene for c in cases]),
            torch.stack([torch.from_numpy(c.mask(self.profile)) for c in cases]),
            [Hole(c.before, c.name, c.after) for c in cases],
            self._seeds("inpaint", len(cases)),
        )
        readings = self.oracle.read(out.images)
        there = [
            any(_overlaps(o, c.hole) and o.name == c.hole.name for o in r.objects) for c, r in zip(cases, readings)
        ]
        agrees = [facts_correct(parse_caption(t, self.profile.names), r.scene) for t, r in zip(out.texts, readings)]
        whole = [a and b and c for a, b, c in zip(there, agrees, out.untouched)]
        for key, values in (("", whole), ("_there", there), ("_agrees", agrees), ("_untouched", out.untouched)):
            self.report.add(f"inpainting{key}", Estimate.share(values))

    def run_joint(self) -> None:
        """Pictures with captions from nothing: they agree, and are as varied as training scenes."""
        self.progress("joint generation")
        out = self.model.generate(self._seeds("joint", self.n))
        readings = self.oracle.read(out.images)
        agrees = [facts_correct(parse_caption(t, self.profile.names), r.scene) for t, r in zip(out.texts, readings)]
        self.report.add("joint_agreement", Estimate.share(agrees))
        truth = scenes("joint", KINDS, self.n, self.seed, self.profile)
        made = [r.scene for r in readings if r.scene is not None]
        self.report.add("joint_distinct", len(set(made)) / len(set(truth)))
        self.report.add("joint_entropy", object_entropy(made) / max(object_entropy(truth), 1e-9))

    def _pictures(self, truth: Sequence[Scene]) -> Tensor:
        return render_batch(list(truth), self.profile)

    def _seeds(self, task: str, n: int) -> list[int]:
        return (keyed_bits(task_seed(task, self.seed), torch.arange(n), 0, 1)[:, 0] >> 2).abs().tolist()


def _drawn_right(category: str, case: PromptCase, reading: Reading) -> bool:
    if category == "background":
        return reading.background == case.facts.background
    return facts_correct(case.facts, reading.scene)


def _overlaps(a, b) -> bool:
    """Whether two sprites share a unit."""
    return a.row < b.row + b.size and b.row < a.row + a.size and a.col < b.col + b.size and b.col < a.col + a.size


def sprite_pixels(scene: Scene, profile: Profile) -> Tensor:
    """bool `[H, W]`, True inside the boxes of the sprites."""
    inside = torch.zeros(profile.image_size, profile.image_size, dtype=torch.bool)
    for item in scene.objects:
        top, left, side = item.row * profile.unit, item.col * profile.unit, item.size * profile.unit
        inside[top : top + side, left : left + side] = True
    return inside


def object_entropy(made: Sequence[Scene]) -> float:
    """Entropy in nats of the names of all objects in some scenes; 0 for none."""
    counts = Counter(item.name for scene in made for item in scene.objects)
    total = sum(counts.values())
    return -sum(n / total * math.log(n / total) for n in counts.values())


def yardstick() -> str:
    """SHA-256 over atlas, generator, grammar, split, cases, oracle and judgement: the same yardstick, the same hash."""
    names = ("atlas", "scenes", "language", "parse", "oracle", "cases", "judge")
    files = [Path(__file__).with_name(f"{name}.py") for name in names]
    return sources_hash([*files, *(atlas_module.ATLAS_FOLDER / f"atlas.{kind}" for kind in ("json", "png"))])
