"""Retrieval: whether the caption of a picture scores higher than captions that do not hold, by likelihood given the picture."""

from __future__ import annotations

from unidiff.evaluation.metrics.base import CaptionedPictures, Metric
from unidiff.evaluation.report import Estimate
from unidiff.pipeline import UniDiffPipeline

SAMPLES = 16


def retrieval(pipe: UniDiffPipeline, cases: CaptionedPictures) -> dict[str, Estimate | float]:
    """The share of pictures whose own caption comes first; the same places are hidden in all captions of a picture.

    Raises:
        ValueError: cases without distractors.
    """
    if not any(cases.distractors):
        raise ValueError("retrieval needs captions that do not hold (distractors), and these cases have none")
    first = []
    for number, (caption, wrong) in enumerate(zip(cases.captions, cases.distractors, strict=True)):
        picture, size = cases.pictures(number, number + 1), cases.batch_size
        scores = pipe.score(
            picture, [caption, *wrong], of="text", samples=SAMPLES, generator=cases.seed + number, batch_size=size
        )
        cases.tick(1)
        first.append(bool((scores.log_prob[0] > scores.log_prob[1:]).all()))
    return {"retrieval": Estimate.share(first)}


RETRIEVAL = Metric("retrieval", retrieval, rounds=1)
