"""Likelihoods on fresh emoji scenes: NELBO(caption | picture) beside its exact floor, and the joint NELBO by modality.

Captions are drawn from a distribution whose entropy the generator knows, so a model whose NELBO(caption | picture) lies
below H(caption | scene) beyond its interval is a bug: it sees its target, or the bound is none.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unidiff.data.collate import TEXT_PREFIX, caption_row
from unidiff.diffusion.likelihood import Nelbo, Scorer, mask_count_nelbo, model_scorer, without_eos_fill
from unidiff.evaluation.report import Estimate, Report
from unidiff.pipeline import UniDiffPipeline
from unidiff.tokens import Modality, Span, TokenBatch, Vocabulary
from unidiff.worlds.emoji.cases import task_seed
from unidiff.worlds.emoji.language import caption_distribution, caption_entropy
from unidiff.worlds.emoji.scenes import Profile, Scene, SceneGenerator
from unidiff.worlds.emoji.table import render_batch

SAMPLES = 8
"""Masks per row; each is a forward pass."""


@dataclass(frozen=True)
class CaptionedScene:
    """A scene, a caption drawn for it, and -log p(caption | scene) in nats."""

    scene: Scene
    caption: str
    surprise: float


def captioned_scenes(n: int, seed: int, profile: Profile) -> list[CaptionedScene]:
    """Scenes in the mix of the training split, each with one caption from its exact distribution."""
    generator = SceneGenerator(profile, task_seed("likelihood", seed))
    cases = []
    for i in range(n):
        scene = generator.scene(i)
        options = caption_distribution(scene)
        caption = random.Random(f"likelihood|{seed}|{i}").choices(list(options), list(options.values()))[0]
        cases.append(CaptionedScene(scene, caption, -math.log(options[caption])))
    return cases


@dataclass(frozen=True)
class LikelihoodEval:
    """Scores rows with a denoiser.

    Args:
        score: see `unidiff.diffusion.likelihood.Scorer`.
        vocabulary: ids of the rows.
        seed: of the masks.
        samples: masks per row.
        batch_size: rows per pass; results do not depend on it.
        device: of the model.
    """

    score: Scorer
    vocabulary: Vocabulary
    seed: int = 0
    samples: int = SAMPLES
    batch_size: int = 64
    device: torch.device | str = "cpu"

    def nelbo(self, rows: TokenBatch, stream: int = 0) -> Nelbo:
        """NELBO of the targets of every row, by the mask-count estimator, keyed by row number."""
        parts = []
        for start in range(0, rows.shape[0], self.batch_size):
            keys = torch.arange(start, min(start + self.batch_size, rows.shape[0]))
            part = rows.rows(keys).to(self.device)
            found = mask_count_nelbo(
                self.score, part, self.vocabulary, keys.to(self.device), self.seed, self.samples, stream
            )
            parts.append({name: value.cpu() for name, value in vars(found).items()})
        return Nelbo(**{name: torch.cat([part[name] for part in parts]) for name in parts[0]})

    def add_to(self, report: Report, rows: TokenBatch, cases: Sequence[CaptionedScene], eos_id: int) -> None:
        """Note all likelihoods of captioned pictures, in nats per row.

        Args:
            rows: text then image, everything but the task token a target; see `captioned_rows`.
            cases: the scene and caption of each row.
            eos_id: vocabulary id of end-of-text. `*_words` leaves the fill behind the first one out, as if the caption's
                length were known, so it may lie below the entropy.
        """
        image = rows.modality == Modality.IMAGE
        short = without_eos_fill(rows, eos_id)
        caption = self.nelbo(rows.replace(given=rows.given | image), 1)
        report.add("caption_nelbo", Estimate.mean(caption.total.numpy()))
        report.add("caption_entropy", sum(caption_entropy(c.scene) for c in cases) / len(cases))
        surprise = torch.tensor([c.surprise for c in cases], dtype=torch.float64)
        report.add("caption_gap", Estimate.mean((caption.total - surprise).numpy()))  # mean NELBO - H, less noise
        words = self.nelbo(short.replace(given=short.given | image), 2)
        report.add("caption_nelbo_words", Estimate.mean(words.total.numpy()))
        picture = self.nelbo(rows.replace(given=rows.given | ~image), 3)
        report.add("image_nelbo", Estimate.mean(picture.total.numpy()))
        for suffix, batch, stream in (("", rows, 4), ("_words", short, 5)):
            joint = self.nelbo(batch, stream)
            report.add(f"joint_nelbo{suffix}", Estimate.mean(joint.total.numpy()))
            report.add(f"joint_nelbo_text{suffix}", Estimate.mean(joint.text.numpy()))
            report.add(f"joint_nelbo_image{suffix}", Estimate.mean(joint.image.numpy()))


def captioned_rows(
    cases: Sequence[CaptionedScene], codes: Tensor, encode: Callable[[str], list[int]], vocabulary: Vocabulary
) -> TokenBatch:
    """Rows `task token, caption, end-of-text fill, image codes`; only the task token is given.

    Args:
        codes: int64 `[B, h, w]`, from the image tokenizer.
        encode: a caption to the text ids of a whole span, task token and fill included.
    """
    rows = []
    for case, grid in zip(cases, codes, strict=True):
        ids = torch.tensor(encode(case.caption)) + vocabulary.text[0]
        given = torch.arange(len(ids)) < TEXT_PREFIX
        rows.append((Span.text(ids, given), Span.image(grid + vocabulary.image[0])))
    return TokenBatch.from_spans(rows)


def evaluate_likelihood(
    pipe: UniDiffPipeline,
    profile: Profile,
    report: Report,
    seed: int = 0,
    n: int = 300,
    samples: int = SAMPLES,
    batch_size: int = 64,
) -> None:
    """Add the likelihoods of a pipeline's model on `n` fresh captioned scenes to a report.

    Raises:
        ValueError: a caption that does not fit the model's text span.
    """
    settings, texts = pipe.settings, pipe.texts
    cases = captioned_scenes(n, seed, profile)
    codes = torch.cat(
        [
            pipe.images.encode(render_batch([c.scene for c in cases[i : i + batch_size]], profile)).cpu()
            for i in range(0, n, batch_size)
        ]
    )

    def encode(caption: str) -> list[int]:
        row = caption_row(texts, caption, settings.text_length)
        if row.cut:
            raise ValueError(f"caption {caption!r} has more tokens than this model's {settings.text_length}")
        return row.ids

    rows = captioned_rows(cases, codes, encode, settings.vocabulary)
    device = next(pipe.transformer.parameters()).device
    score = model_scorer(pipe.transformer, settings.vocabulary)
    judge = LikelihoodEval(score, settings.vocabulary, seed, samples, batch_size, device)
    judge.add_to(report, rows, cases, texts.eos_id + settings.vocabulary.text[0])
