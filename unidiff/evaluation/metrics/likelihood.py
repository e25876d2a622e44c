"""Likelihoods: NELBO(caption | picture) beside its exact floor, and the joint NELBO by modality, in nats per row.

A world knows the entropy H(caption | picture) of its captions; a NELBO below it, beyond its interval, is a bug.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from unidiff.data.rows import TEXT_PREFIX, caption_row
from unidiff.diffusion.likelihood import Nelbo, Scorer, model_scorer, nelbo_in_parts, without_eos_fill
from unidiff.evaluation.metrics.base import CaptionedPictures, Metric
from unidiff.evaluation.report import Estimate
from unidiff.pipeline import UniDiffPipeline
from unidiff.tokens import Modality, Span, TokenBatch, Vocabulary


@dataclass(frozen=True)
class RowLikelihood:
    """Scores rows with a denoiser.

    Args:
        score: see `unidiff.diffusion.likelihood.Scorer`. vocabulary: ids of the rows.
        seed: of the masks. samples: masks per row, each a forward pass.
        batch_size: rows per pass; results do not depend on it. device: of the model.
        tick: called with how many more rows are done, of five times all of them.
    """

    score: Scorer
    vocabulary: Vocabulary
    seed: int = 0
    samples: int = 8
    batch_size: int = 64
    device: torch.device | str = "cpu"
    tick: Callable[[int], None] = lambda rows: None

    def nelbo(self, rows: TokenBatch, stream: int = 0) -> Nelbo:
        """NELBO of the targets of every row, by the mask-count estimator, keyed by row number."""
        own = self.seed, self.samples, stream, self.batch_size, self.device
        return nelbo_in_parts(self.score, rows, self.vocabulary, torch.arange(rows.shape[0]), *own, self.tick)

    def numbers(
        self, rows: TokenBatch, eos_id: int, surprises: Sequence[float] = (), entropies: Sequence[float] = ()
    ) -> dict[str, Estimate | float]:
        """All likelihoods of captioned pictures.

        Args:
            rows: see `captioned_rows`.
            eos_id: vocabulary id of end-of-text. `*_words` scores rows without the fill behind the first one, which the
                model does not see there either, as if the caption's length were known; so it may lie below the entropy.
                A model whose training never cut the fill (`crop_fill` is 0) never saw such rows. For it these numbers say
                how much it depends on the fill, and may lie above those of whole rows: do not compare it by them.
            surprises, entropies: see `CaptionedPictures`; without them there is no floor to compare with.
        """
        mean = lambda values: Estimate.mean(values.numpy())  # noqa: E731
        image, short = rows.modality == Modality.IMAGE, without_eos_fill(rows, eos_id)
        caption = self.nelbo(rows.replace(given=rows.given | image), 1).total
        found: dict[str, Estimate | float] = {"caption_nelbo": mean(caption)}
        if surprises:
            found["caption_entropy"] = sum(entropies) / len(entropies)
            found["caption_gap"] = Estimate.mean(caption.numpy() - np.asarray(surprises))  # mean NELBO - H, less noise
        found["caption_nelbo_words"] = mean(self.nelbo(short.replace(given=short.given | image), 2).total)
        found["image_nelbo"] = mean(self.nelbo(rows.replace(given=rows.given | ~image), 3).total)
        for suffix, batch, stream in (("", rows, 4), ("_words", short, 5)):
            joint = self.nelbo(batch, stream)
            for part, values in (("", joint.total), ("_text", joint.text), ("_image", joint.image)):
                found[f"joint_nelbo{part}{suffix}"] = mean(values)
        return found


def captioned_rows(
    captions: Sequence[str], codes: Tensor, encode: Callable[[str], list[int]], vocabulary: Vocabulary
) -> TokenBatch:
    """Rows `task token, caption, end-of-text fill, image codes`; only the task token is given, all else a target.

    Args:
        codes: int64 `[B, h, w]`, from the image tokenizer.
        encode: a caption to the text ids of a whole span, task token and fill included.
    """
    rows = []
    for caption, grid in zip(captions, codes, strict=True):
        ids = torch.tensor(encode(caption)) + vocabulary.text[0]
        given = torch.arange(len(ids)) < TEXT_PREFIX
        rows.append((Span.text(ids, given), Span.image(grid + vocabulary.image[0])))
    return TokenBatch.from_spans(rows)


def likelihoods(pipe: UniDiffPipeline, cases: CaptionedPictures) -> dict[str, Estimate | float]:
    """The likelihoods of a pipeline's model.

    Raises:
        ValueError: a caption that does not fit the model's text span, or a model of another family.
    """
    if not hasattr(pipe, "settings"):
        raise ValueError(
            f"likelihoods are of unidiff's own masked models, this one is of {pipe.layout.family}; leave them out"
        )
    settings, texts, size, n = pipe.settings, pipe.texts, cases.batch_size, len(cases.captions)
    codes = torch.cat([pipe.images.encode(cases.pictures(i, min(i + size, n))).cpu() for i in range(0, n, size)])

    def encode(caption: str) -> list[int]:
        row = caption_row(texts, caption, settings.text_length)
        if row.cut:
            raise ValueError(f"caption {caption!r} has more tokens than this model's {settings.text_length}")
        return row.ids

    rows = captioned_rows(cases.captions, codes, encode, settings.vocabulary)
    device = next(pipe.transformer.parameters()).device
    score = model_scorer(pipe.transformer, settings.vocabulary)
    judge = RowLikelihood(score, settings.vocabulary, cases.seed, batch_size=size, device=device, tick=cases.tick)
    return judge.numbers(rows, texts.eos_id + settings.vocabulary.text[0], cases.surprises, cases.entropies)


LIKELIHOOD = Metric("likelihood", likelihoods, rounds=5)
