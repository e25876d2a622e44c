"""`score_results`: one metric of what lies in files (or of pictures in memory), as a report with intervals."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from unidiff.evaluation.metrics.base import METRICS, Metric
from unidiff.evaluation.networks.base import NetworkSource
from unidiff.evaluation.report import EvaluationReport
from unidiff.evaluation.results.base import Results, Source


def score_results(
    metric: str | Metric,
    made: Source,
    against: Source | None = None,
    network: NetworkSource | None = None,
    *,
    seed: int = 0,
    resamples: int | None = None,
    batch_size: int = 32,
    device: str = "cpu",
    tick: Callable[[int, int | None], None] = lambda more, total: None,
) -> EvaluationReport:
    """Score what a model made.

    Args:
        metric: an entry of `METRICS` that scores results, or its name: bleu, cider, clipscore, fid, ...
        made: pictures (a folder, or pictures themselves), or a file or folder of captions or answers, as the metric says.
        against: what it is compared with, likewise.
        network: of features (see `feature_network`), or the folder of a judge.
        seed: of all draws. resamples: of the bootstrap, or the subsets of KID; None for the metric's own number.
        batch_size: pictures or texts at once. device: of networks that are loaded. tick: called with progress.

    Returns:
        Every number with its interval; `about` has the counts of pictures by mode, the seed, and `notes`: sentences about
        whatever is unusual.

    Raises:
        FileNotFoundError: a missing file, folder or weights. ValueError: an unknown metric, something that it needs and
            did not get or got and does not take, or files of another layout.
    """
    chosen = metric if isinstance(metric, Metric) else METRICS.get_or_refuse(metric, "the metric")
    if chosen.score is None:
        raise ValueError(
            f"{chosen.name} is measured on a model (unidiff eval WORLD --task {chosen.name}), not on files"
        )
    for flag, value, meant in (("against", against, chosen.against), ("network", network, chosen.network)):
        if value is None and meant and "(optional)" not in meant:
            raise ValueError(f"{chosen.name} needs {meant} (--{flag})")
        if value is not None and not meant:
            raise ValueError(f"{chosen.name} takes no --{flag}; leave it out")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; expected at least 1")
    results = Results(made, against, network, seed, resamples, batch_size, device, tick)
    report = EvaluationReport()
    for key, number in chosen.score(results).items():
        report.add(key, number)
    cases = hashlib.sha256("\0".join(results.keys).encode("utf-8", "surrogateescape")).hexdigest()[:16]
    report.about = {"yardstick": f"{chosen.name} of cases {cases}", "n": len(results.keys), "seed": seed}
    report.about |= {"made": _shown(made)} | ({} if against is None else {"against": _shown(against)})
    report.about |= {**results.about, "notes": results.notes}
    return report


def _shown(source: Source) -> Any:
    return str(source) if isinstance(source, str | Path) else f"{len(source)} pictures"
