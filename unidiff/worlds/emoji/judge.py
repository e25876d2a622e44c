"""EmojiEval: what a model draws, says, answers and repaints, judged by an exact oracle."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unidiff.diffusion.noise import keyed_bits
from unidiff.evaluation.report import Estimate, EvaluationReport, sources_hash
from unidiff.pipeline import UniDiffPipeline
from unidiff.pipelines.output import UniDiffOutput
from unidiff.worlds.emoji.cases import (
    CATEGORIES,
    HELD_OUT,
    InpaintCase,
    caption_scenes,
    inpaint_cases,
    prompt_cases,
    question_cases,
    scenes,
    task_seed,
)
from unidiff.worlds.emoji.language import facts_correct, parse_caption
from unidiff.worlds.emoji.oracle import Oracle, Reading
from unidiff.worlds.emoji.scenes import ATLAS_FOLDER, KINDS, Profile, Scene, render_batch

TASKS = ("reader", "text_to_image", "caption", "answer", "inpaint", "generate")
"""Parts of the evaluation, each of which can be left out."""


@dataclass
class EmojiEval:
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

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"n is {self.n}; an evaluation needs at least one case")
        self.oracle = Oracle(self.profile)

    def run(self, tasks: Sequence[str] = TASKS) -> EvaluationReport:
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
        pictures = render_batch(truth, self.profile)
        rebuilt = self.model.reconstruct(pictures)
        seen, kept = self.oracle.read(pictures), self.oracle.read(rebuilt)
        self._share("oracle_true", [r.scene == s for r, s in zip(seen, truth)])
        self._share("oracle_reconstruction", [item in r.objects for r, s in zip(kept, truth) for item in s.objects])
        self._share("oracle_reconstruction_scene", [r.scene == s for r, s in zip(kept, truth)])
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
            images = self.model.text_to_image(prompts, self._seeds(category, len(cases)))
            self.drawn += zip(prompts, (images * 255 + 0.5).clamp(0, 255).to(torch.uint8).movedim(1, -1), strict=True)
            readings = self.oracle.read(images)
            if category == "background":
                right = [r.background == c.facts.background for c, r in zip(cases, readings)]
            else:
                right = [facts_correct(c.facts, r.scene) for c, r in zip(cases, readings)]
            score = self._share(HELD_OUT if category == HELD_OUT else f"categories.{category}", right)
            scores += [score] if category != HELD_OUT else []
            self._share(f"unreadable.{category}", [r.scene is None for r in readings])
            if category == "composition" and self.n > 1:
                swapped = zip([*cases[1:], cases[0]], readings)
                self._share("shuffled_composition", [facts_correct(c.facts, r.scene) for c, r in swapped])
        self.report.add("text_to_image", Estimate.average(scores))

    def run_caption(self) -> None:
        """Captions: in the grammar, everything named is true, no object left out."""
        right: list[bool] = []
        for kind in KINDS:
            truth = caption_scenes(kind, self.n, self.seed, self.profile)
            self.progress(f"captions, {kind}")
            texts = self.model.caption(render_batch(truth, self.profile), self._seeds(f"caption {kind}", len(truth)))
            these = self._true(texts, truth)
            self._share(f"captions.{kind}", these)
            right += these
        self._share("caption_exact", right)

    def run_answer(self) -> None:
        """Answers, word for word; and how far the best constant answer of each kind of question gets."""
        cases = question_cases(self.n, self.seed, self.profile)
        self.progress("answers")
        pictures = render_batch([c.scene for c in cases], self.profile)
        texts = self.model.answer(pictures, [c.question for c in cases], self._seeds("answer", len(cases)))
        right = [t.strip() == c.answer for t, c in zip(texts, cases)]
        self._share("answer_accuracy", right)
        common = 0
        for kind in sorted({c.kind for c in cases}):
            of_kind = [i for i, c in enumerate(cases) if c.kind == kind]
            self._share(f"answers.{kind}", [right[i] for i in of_kind])
            common += Counter(cases[i].answer for i in of_kind).most_common(1)[0][1]
        self.report.add("answer_baseline", common / len(cases))

    def run_inpaint(self) -> None:
        """Holes: the repainted picture and the completed caption agree, and nothing given was touched."""
        cases = inpaint_cases(self.n, self.seed, self.profile)
        self.progress("inpainting")
        pictures = render_batch([c.scene for c in cases], self.profile)
        masks = torch.stack([self.profile.boxes([c.hole]) for c in cases])
        out = self.model.inpaint(pictures, masks, cases, self._seeds("inpaint", len(cases)))
        readings, agrees = self._agreement(out)
        same = lambda o, hole: o.overlaps(hole) and o.name == hole.name  # noqa: E731
        there = [any(same(o, c.hole) for o in r.objects) for c, r in zip(cases, readings)]
        whole = [a and b and c for a, b, c in zip(there, agrees, out.untouched)]
        for key, values in (("", whole), ("_there", there), ("_agrees", agrees), ("_untouched", out.untouched)):
            self._share(f"inpainting{key}", values)

    def run_generate(self) -> None:
        """Pictures with captions from nothing: they agree, and are as varied as training scenes."""
        self.progress("joint generation")
        readings, agrees = self._agreement(self.model.generate(self._seeds("joint", self.n)))
        self._share("joint_agreement", agrees)
        truth = scenes("joint", KINDS, self.n, self.seed, self.profile)
        made = [r.scene for r in readings if r.scene is not None]
        self.report.add("joint_distinct", len(set(made)) / len(set(truth)))
        self.report.add("joint_entropy", object_entropy(made) / max(object_entropy(truth), 1e-9))

    def _share(self, key: str, right: Sequence[bool]) -> Estimate:
        estimate = Estimate.share(right)
        self.report.add(key, estimate)
        return estimate

    def _true(self, texts: Sequence[str], truth: Sequence[Scene | None]) -> list[bool]:
        """Whether each text is a caption of its scene."""
        return [facts_correct(parse_caption(t, self.profile.names), s) for t, s in zip(texts, truth)]

    def _agreement(self, out: Drawn) -> tuple[list[Reading], list[bool]]:
        """What is on the pictures, and whether the texts say so."""
        readings = self.oracle.read(out.images)
        return readings, self._true(out.texts, [r.scene for r in readings])

    def _seeds(self, task: str, n: int) -> list[int]:
        return (keyed_bits(task_seed(task, self.seed), torch.arange(n), 0, 1)[:, 0] >> 2).abs().tolist()


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


@dataclass(frozen=True)
class Drawn:
    """Pictures float `[B, 3, H, W]` in [0, 1] and texts of some rows, and whether every given token came out as it went in."""

    images: Tensor
    texts: list[str]
    untouched: list[bool]


class PipelineModel:
    """A pipeline, run in batches with its own settings for each task: all that EmojiEval asks of a model.

    Pictures are float `[B, 3, H, W]` in [0, 1]; there is one seed per row.

    Args:
        batch_size: rows per decode; results do not depend on it. on_output: told what came out of every decode.
        options: keyword arguments for every decode, for instance `steps`.
    """

    def __init__(
        self,
        pipe: UniDiffPipeline,
        batch_size: int = 64,
        on_output: Callable[[UniDiffOutput], Any] = lambda out: None,
        **options: Any,
    ) -> None:
        self.pipe, self.batch_size, self.on_output = pipe, batch_size, on_output
        self.options = {"output_type": "pt", **options}

    def reconstruct(self, images: Tensor) -> Tensor:
        """Through the image tokenizer and back."""
        through = lambda part: self.pipe.images.decode(self.pipe.images.encode(part)).cpu()  # noqa: E731
        return torch.cat([through(part) for part in images.split(self.batch_size)])

    def text_to_image(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        return self._decode(seeds, lambda p, **how: self.pipe.text_to_image(list(prompts[p]), **how)).images

    def caption(self, images: Tensor, seeds: Sequence[int]) -> list[str]:
        return self._decode(seeds, lambda p, **how: self.pipe.caption(images[p], **how)).texts

    def answer(self, images: Tensor, questions: Sequence[str], seeds: Sequence[int]) -> list[str]:
        return self._decode(seeds, lambda p, **how: self.pipe.answer(images[p], list(questions[p]), **how)).texts

    def inpaint(self, images: Tensor, masks: Tensor, cases: Sequence[InpaintCase], seeds: Sequence[int]) -> Drawn:
        """Repaint where `masks` (bool `[B, H, W]`) is True and fill the holes of the captions."""

        def fill(p: slice, **how: Any) -> UniDiffOutput:
            templates = [case.template(self.pipe.texts.encode) for case in cases[p]]
            return self.pipe.inpaint(list(images[p]), list(masks[p]), templates, **how)

        def untouched(p: slice, out: UniDiffOutput) -> Iterator[bool]:
            kept = ~self.pipe.image_inputs.cells(masks[p])  # [B, h, w]
            same = (out.codes == self.pipe.images.encode(images[p]).cpu()) | ~kept
            for case, text, whole in zip(cases[p], out.texts, same.flatten(1).all(1).tolist(), strict=True):
                yield whole and text.startswith(case.before.strip()) and text.endswith(case.after.strip())

        return self._decode(seeds, fill, untouched)

    def generate(self, seeds: Sequence[int]) -> Drawn:
        """A picture and its caption for each seed, from nothing."""
        call = lambda p, **how: self.pipe.generate(num_images_per_prompt=len(how["generator"]), **how)  # noqa: E731
        return self._decode(seeds, call)

    def _decode(
        self,
        seeds: Sequence[int],
        call: Callable[..., UniDiffOutput],
        untouched: Callable[[slice, UniDiffOutput], Iterator[bool]] = lambda p, out: (True for _ in out.texts),
    ) -> Drawn:
        """All rows, batch by batch; `call` takes the slice of the rows and the options of the decode."""
        pictures, texts, whole = list[Tensor](), list[str](), list[bool]()
        for start in range(0, len(seeds), self.batch_size):
            part = slice(start, start + self.batch_size)
            out = call(part, generator=list(seeds[part]), **self.options)
            self.on_output(out)
            pictures.append(torch.as_tensor(out.images))
            texts += out.texts
            whole += untouched(part, out)
        return Drawn(torch.cat(pictures), texts, whole)
