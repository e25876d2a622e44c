"""The evaluation of faces: what a model draws, says, answers and repaints, judged by the exact reader."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from unidiff.evaluation.report import Estimate, EvaluationReport, sources_hash
from unidiff.worlds.asked import PipelineModel
from unidiff.worlds.faces.cases import (
    FacePrompt,
    case_faces,
    held_out_cases,
    hole_cases,
    holes,
    prompt_cases,
    question_cases,
    task_seed,
)
from unidiff.worlds.faces.language import Facts, draw_caption, facts_hold, parse_caption
from unidiff.worlds.faces.reader import FaceReading, read_faces
from unidiff.worlds.faces.scenes import ATTRIBUTES, LAYERS_FOLDER, NONE, Face, FaceGenerator, render_batch
from unidiff.worlds.judging import Judging

TASKS = ("reader", "text_to_image", "caption", "answer", "inpaint", "generate")
"""Parts of the evaluation, each of which can be left out."""


@dataclass
class FacesEval(Judging):
    """One evaluation: who is judged, on what, and what came out.

    Args:
        model: who is judged. seed: of faces, prompts and decodes. n: cases per category and task. progress: told what comes next.
    """

    model: PipelineModel
    seed: int = 0
    n: int = 300
    progress: Callable[[str], None] = lambda what: None
    report: EvaluationReport = field(default_factory=EvaluationReport)

    tasks = TASKS

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"n is {self.n}; an evaluation needs at least one case")

    def about(self) -> dict[str, Any]:
        return {"yardstick": yardstick()}

    def describe(self, reading: FaceReading) -> str:
        return describe(reading)

    def seed_of(self, task: str) -> int:
        return task_seed(task, self.seed)

    def run_reader(self) -> None:
        """The reader on true pictures, and the image tokenizer on them."""
        self.progress("reader")
        faces = case_faces("reader", 2 * self.n, self.seed, "all")
        pictures = render_batch(faces)
        self.share("reader_true", [r.face == f for r, f in zip(read_faces(pictures), faces, strict=True)])
        rebuilt = self.model.reconstruct(pictures)
        self.share("reconstruction_exact", ((rebuilt - pictures).abs().amax((1, 2, 3)) < 1 / 512).tolist())

    def run_text_to_image(self) -> None:
        """Pictures from prompts: each attribute that is stated, and whole pictures."""
        cases, readings = self._drawn("attributes", prompt_cases(self.n, self.seed))
        found = [_right(case.facts, reading) for case, reading in zip(cases, readings, strict=True)]
        self.report.add("text_to_image", Estimate.mean([sum(right.values()) / len(right) for right in found]))
        for name in ATTRIBUTES:
            if stated := [right[name] for right in found if name in right]:
                self.share(f"attributes.{name}", stated)
        self.share("all_attributes", [all(right.values()) for right in found])
        self.share("whole_pictures", [reading.wrong == 0 for reading in readings])
        cases, readings = self._drawn("held-out pairs", held_out_cases(self.n, self.seed))
        self.share("held_out_pairs", [_shows(case, reading) for case, reading in zip(cases, readings, strict=True)])

    def _drawn(self, category: str, cases: list[FacePrompt]) -> tuple[list[FacePrompt], list[FaceReading]]:
        self.progress(f"text-to-image, {category}")
        prompts, seeds = [case.prompt for case in cases], self.seeds(category, len(cases))
        pictures = self.model.text_to_image(prompts, seeds)
        readings = read_faces(pictures)
        right = [agrees(case.facts, reading) for case, reading in zip(cases, readings, strict=True)]
        self.look("text_to_image", category, seeds, right, asked=prompts, seen=readings, drawn=pictures)
        return cases, readings

    def run_caption(self) -> None:
        """Captions: in the grammar, and everything stated is true."""
        self.progress("captions")
        faces = case_faces("caption", self.n, self.seed)
        pictures, seeds = render_batch(faces), self.seeds("caption", self.n)
        texts = self.model.caption(pictures, seeds)
        right = [facts_hold(parse_caption(text), face) for text, face in zip(texts, faces, strict=True)]
        generator = FaceGenerator(task_seed("caption", self.seed))
        known = [draw_caption(face, generator.rng(i, "caption")) for i, face in enumerate(faces)]
        self.look("caption", "", seeds, right, wrote=texts, expected=known, given=pictures)
        self.share("caption_exact", right)
        self.share("caption_readable", [parse_caption(text) is not None for text in texts])

    def run_answer(self) -> None:
        """Answers, word for word; and how far the best constant answer of each kind of question gets."""
        self.progress("answers")
        cases = question_cases(self.n, self.seed)
        pictures, seeds = render_batch([case.face for case in cases]), self.seeds("answer", len(cases))
        questions, known = [case.question for case in cases], [case.answer for case in cases]
        texts = self.model.answer(pictures, questions, seeds)
        right = [text.strip() == case.answer for text, case in zip(texts, cases, strict=True)]
        kinds = [case.kind for case in cases]
        self.look("answer", kinds, seeds, right, asked=questions, wrote=texts, expected=known, given=pictures)
        self.answered(kinds, known, right)

    def run_inpaint(self) -> None:
        """Holes: the repainted picture and the completed caption agree, and nothing given was touched."""
        self.progress("inpainting")
        cases = hole_cases(self.n, self.seed)
        pictures, masks, seeds = render_batch([c.face for c in cases]), holes(cases), self.seeds("inpaint", len(cases))
        out = self.model.inpaint(pictures, masks, cases, seeds)
        readings = read_faces(out.images)
        true = [agrees(parse_caption(text), reading) for text, reading in zip(out.texts, readings, strict=True)]
        right = [a and b for a, b in zip(true, out.untouched, strict=True)]
        torn = torch.where(masks[:, None], 0.5, pictures)
        facets, known = [case.facet for case in cases], [case.caption for case in cases]
        shown = {"wrote": out.texts, "seen": readings, "expected": known, "given": torn, "drawn": out.images}
        asked = [f"{case.before}\u2026{case.after}" for case in cases]
        self.look("inpaint", facets, seeds, right, asked=asked, **shown)
        self.share("inpainting", right)
        self.share("inpainting_agrees", true)
        self.share("inpainting_untouched", out.untouched)
        self.share("inpainting_whole", [reading.wrong == 0 for reading in readings])
        for facet in dict.fromkeys(facets):
            self.share(f"holes.{facet}", [r for r, own in zip(right, facets, strict=True) if own == facet])

    def run_generate(self) -> None:
        """Pictures with captions from nothing: they agree, and are as varied as training faces."""
        self.progress("joint generation")
        seeds = self.seeds("joint", self.n)
        out = self.model.generate(seeds)
        readings = read_faces(out.images)
        true = [agrees(parse_caption(text), reading) for text, reading in zip(out.texts, readings, strict=True)]
        self.look("generate", "", seeds, true, wrote=out.texts, seen=readings, drawn=out.images)
        self.share("joint_agreement", true)
        self.share("joint_whole", [reading.wrong == 0 for reading in readings])
        truth, made = case_faces("joint", self.n, self.seed), [reading.nearest for reading in readings]
        self.report.add("joint_distinct", len(set(made)) / len(set(truth)))
        self.report.add("joint_entropy", value_entropy(made) / max(value_entropy(truth), 1e-9))


def _right(facts: Facts, reading: FaceReading) -> dict[str, bool]:
    """Whether each stated attribute is read from a picture."""
    return {name: reading.value(name) == value for name, value in facts.items()}


def _shows(case: FacePrompt, reading: FaceReading) -> bool:
    """Whether both values of the held-out pair are there."""
    right = _right(case.facts, reading)
    return case.pair is not None and right[case.pair[0]] and right[case.pair[2]]


def agrees(facts: Facts | None, reading: FaceReading) -> bool:
    """Whether a text that could be read states nothing but what is read from a picture."""
    return facts is not None and all(_right(facts, reading).values())


def describe(reading: FaceReading) -> str:
    """What a reader saw, in words."""
    names = [name for name in ATTRIBUTES if name not in reading.unread and reading.value(name) != NONE]
    said = ", ".join(f"{name.replace('_', ' ')} {reading.value(name)}" for name in names)
    return f"{said or 'nothing'}; {reading.wrong} of 256 pixels not explained" if reading.wrong else said


def value_entropy(faces: Sequence[Face]) -> float:
    """The mean over the attributes of the entropy of their values in some faces, in nats; 0 for no faces."""
    total = 0.0
    for values in zip(*faces, strict=True):
        shares = [n / len(faces) for n in Counter(values).values()]
        total -= sum(p * math.log(p) for p in shares)
    return total / len(ATTRIBUTES)


def yardstick() -> str:
    """SHA-256 over layers, generator, grammar, split, cases, reader and judgement: the same yardstick, the same hash."""
    names = ("scenes", "language", "reader", "cases", "judge")
    files = [Path(__file__).with_name(f"{name}.py") for name in names]
    return sources_hash([*files, *(LAYERS_FOLDER / f"layers.{kind}" for kind in ("json", "png"))])
