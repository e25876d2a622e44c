"""What a metric is: a name, and a function of a pipeline and cases, or of results that lie in files, that gives numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from unidiff.evaluation.networks.base import FeatureNetwork
from unidiff.evaluation.report import Estimate
from unidiff.evaluation.results.base import Results
from unidiff.pipeline import UniDiffPipeline
from unidiff.registry import Registry

Numbers = Mapping[str, Estimate | float]
"""By key (a dot nests them in the report), each with its interval where it is an `Estimate`."""


@dataclass(frozen=True)
class CaptionedPictures:
    """Pictures with captions that a world has drawn.

    Attributes:
        captions: one for each picture.
        pictures: (start, stop) -> those pictures, float32 `[stop - start, 3, H, W]` in [0, 1].
        surprises: -log p(caption | picture) in nats where the world knows it. entropies: H(caption | picture).
        distractors: captions of each that do not hold. seed: of everything that a metric draws. batch_size: rows at once; results do not depend on it.
        network: features of the world's own reader.
        tick: called with how many pictures have been gone through, `Metric.rounds` times each.
        prompts: of pictures to be drawn. shows: (texts, pictures) -> whether each picture is what the text says.
        phrasings: prompts as people might write them.
        options: of every decode. folder: where a metric that takes long keeps what it has, and goes on after a stop.
    """

    captions: Sequence[str]
    pictures: Callable[[int, int], Tensor]
    surprises: Sequence[float] = ()
    entropies: Sequence[float] = ()
    distractors: Sequence[Sequence[str]] = ()
    seed: int = 0
    batch_size: int = 64
    network: FeatureNetwork | None = None
    tick: Callable[[int], None] = lambda rows: None
    prompts: Sequence[str] = ()
    phrasings: Sequence[str] = ()
    shows: Callable[[Sequence[str], Tensor], Sequence[bool]] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    folder: Path | None = None


@dataclass(frozen=True)
class Metric:
    """A metric of a model on the cases of a world, of results in files, or of both.

    Attributes:
        measure: for `unidiff eval WORLD --task NAME`. score: for `unidiff eval score NAME`; see `score_results`.
        made, against, network: what `score` reads, for messages; an empty text is what it does not take.
        rounds: how often `measure` goes through all pictures and tells `tick`.
    """

    name: str
    measure: Callable[[UniDiffPipeline, CaptionedPictures], Numbers] | None = None
    score: Callable[[Results], Numbers] | None = None
    made: str = ""
    against: str = ""
    network: str = ""
    rounds: int = 0


METRICS: Registry[Metric] = Registry(
    "metrics", "unidiff.evaluation.metrics", lambda v: v.name if isinstance(v, Metric) else None
)


def model_metrics() -> dict[str, Callable[[UniDiffPipeline, CaptionedPictures], Numbers]]:
    """Those that are measured on the cases of a world, by name."""
    return {name: metric.measure for name, metric in METRICS.items() if metric.measure is not None}
