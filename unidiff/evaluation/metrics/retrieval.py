"""Retrieval: whether the caption of a picture scores higher than captions that do not hold, by likelihood given the picture."""

from __future__ import annotations

from typing import Any

from unidiff.evaluation.matching import multiple_choice
from unidiff.evaluation.metrics.base import CaptionedPictures, Metric
from unidiff.evaluation.report import Estimate
from unidiff.pipeline import UniDiffPipeline

SAMPLES = 8
"""Draws of masks of each caption."""


def retrieval(pipe: UniDiffPipeline, cases: CaptionedPictures) -> dict[str, Estimate | float]:
    """The share of pictures whose own caption comes first; the same places are hidden in all captions of a picture.

    Raises:
        ValueError: cases without distractors.
    """
    if not any(cases.distractors):
        raise ValueError("retrieval needs captions that do not hold (distractors), and these cases have none")
    choices = [[caption, *wrong] for caption, wrong in zip(cases.captions, cases.distractors, strict=True)]
    seeds = [cases.seed + number for number in range(len(choices))]
    size = cases.batch_size
    scores = list[list[float]]()
    for start in range(0, len(choices), size):  # pictures are rendered a few at a time
        part = slice(start, min(start + size, len(choices)))
        pictures = list(cases.pictures(part.start, part.stop))
        how: dict[str, Any] = {"samples": SAMPLES, "generator": seeds[part], "batch_size": size}
        scores += multiple_choice(pipe, choices[part], pictures, **how).scores
        cases.tick(len(pictures))
    return {"retrieval": Estimate.share(all(own[0] > other for other in own[1:]) for own in scores)}


RETRIEVAL = Metric("retrieval", retrieval, rounds=1)
