"""Free phrasing: whether pictures show what people asked for in words of their own."""

from __future__ import annotations

import torch

from unidiff.evaluation.metrics.base import CaptionedPictures, Metric
from unidiff.evaluation.report import Estimate
from unidiff.pipeline import UniDiffPipeline
from unidiff.pipelines.decode import row_seeds


def free_phrasing(pipe: UniDiffPipeline, cases: CaptionedPictures) -> dict[str, Estimate | float]:
    """The share of pictures that show all that their prompts say, and nothing else.

    Raises:
        ValueError: a world without such prompts, or one that cannot say whether a picture shows them.
    """
    if cases.shows is None or not cases.phrasings:
        raise ValueError(
            "free_phrasing needs prompts as people might write them and a reader of pictures; these cases have none"
        )
    right, seeds = list[bool](), row_seeds(cases.seed, len(cases.phrasings)).tolist()
    for start in range(0, len(seeds), cases.batch_size):
        part = slice(start, start + cases.batch_size)
        words = list(cases.phrasings[part])
        out = pipe.text_to_image(words, **cases.options, generator=seeds[part], output_type="pt")
        right += cases.shows(words, torch.as_tensor(out.images))
        cases.tick(len(words))
    return {"free_phrasing": Estimate.share(right)}


FREE_PHRASING = Metric("free_phrasing", free_phrasing, rounds=1)
