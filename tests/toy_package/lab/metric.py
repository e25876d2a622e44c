"""A metric."""

from unidiff.evaluation.metrics.base import CaptionedPictures, Metric
from unidiff.evaluation.report import Estimate
from unidiff.pipeline import UniDiffPipeline


def words_per_caption(pipe: UniDiffPipeline, cases: CaptionedPictures) -> dict[str, Estimate | float]:
    texts = pipe.caption(cases.pictures(0, len(cases.captions)), generator=cases.seed).texts
    return {"words": Estimate.mean([len(text.split()) for text in texts])}


WORDS = Metric("words", words_per_caption)
