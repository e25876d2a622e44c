"""What a metric is: a name, and a function of a pipeline and cases that gives numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from unidiff.evaluation.report import Estimate
from unidiff.pipeline import UniDiffPipeline
from unidiff.registry import Registry


@dataclass(frozen=True)
class CaptionedPictures:
    """Pictures with captions that a world has drawn.

    Attributes:
        captions: one for each picture.
        pictures: (start, stop) -> those pictures, float32 `[stop - start, 3, H, W]` in [0, 1].
        surprises: -log p(caption | picture) in nats where the world knows it. entropies: H(caption | picture).
        distractors: captions of each that do not hold. seed: of everything that a metric draws. batch_size: rows at once; results do not depend on it.
    """

    captions: Sequence[str]
    pictures: Callable[[int, int], Tensor]
    surprises: Sequence[float] = ()
    entropies: Sequence[float] = ()
    distractors: Sequence[Sequence[str]] = ()
    seed: int = 0
    batch_size: int = 64


@dataclass(frozen=True)
class Metric:
    """Numbers by key (a dot nests them in the report), each with its interval where it is an `Estimate`."""

    name: str
    measure: Callable[[UniDiffPipeline, CaptionedPictures], Mapping[str, Estimate | float]]


METRICS: Registry[Metric] = Registry(
    "metrics", "unidiff.evaluation.metrics", lambda v: v.name if isinstance(v, Metric) else None
)
