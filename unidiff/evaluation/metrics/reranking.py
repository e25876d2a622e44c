"""Best of n by likelihood: how much of what a perfect judge would gain `pipe.score` gains, on prompts of a world.

For each prompt n pictures are drawn. One of them at random is right in the mean share `one`, at least one in `best`; the one
that a score keeps is right in `kept`, and (kept - one) / (best - one) is the share of the gap that it closes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from unidiff.evaluation.benchmark.measure import model_hash
from unidiff.evaluation.metrics.base import CaptionedPictures, Metric
from unidiff.evaluation.report import Z95, Estimate
from unidiff.pipeline import UniDiffPipeline
from unidiff.pipelines.batch import add_to_manifest, begin_manifest, digest_of
from unidiff.pipelines.decode import candidate_seeds, row_seeds

COUNT, SAMPLES, PROMPTS = 4, 4, 16
"""Pictures of a prompt, draws of masks of a score, prompts of a decode."""
KEPT = {"text": ("text",), "image": ("image",), "each": ("text", "image")}
"""Scores that are compared: sums of log p(text | image) and log p(image | text)."""


def reranking(pipe: UniDiffPipeline, cases: CaptionedPictures) -> dict[str, Estimate | float]:
    """Shares of prompts, by key; with a folder in `cases` a run that was stopped goes on where it was.

    Raises:
        ValueError: a world that has no prompts, or cannot say whether a picture shows them.
    """
    if cases.shows is None or not cases.prompts:
        raise ValueError("reranking needs prompts and a reader of pictures, and these cases have none")
    rows = begun(pipe, cases) if cases.folder else []
    todo = [number for number in range(len(cases.prompts)) if number not in {row["number"] for row in rows}]
    cases.tick(len(rows))
    for start in range(0, len(todo), PROMPTS):
        fresh = drawn(pipe, cases, todo[start : start + PROMPTS])
        if cases.folder:
            add_to_manifest(cases.folder, fresh)
        rows += fresh
        cases.tick(len(fresh))
    rows.sort(key=lambda row: int(row["number"]))
    return gains(np.array([row["right"] for row in rows]), {part: _column(rows, part) for part in ("text", "image")})


def begun(pipe: UniDiffPipeline, cases: CaptionedPictures) -> list[dict[str, Any]]:
    """Rows that were done in an earlier run of the same model, prompts, seed and options."""
    assert cases.folder is not None
    asked = {
        "model_hash": model_hash(pipe),
        "prompts": len(cases.prompts),
        "prompts_hash": digest_of(list(cases.prompts)),
    }
    asked |= {"seed": cases.seed, "pictures": COUNT, "draws": SAMPLES, "options": dict(cases.options)}
    return begin_manifest(cases.folder, asked, "reranking", pipe.device, alone=True)


def drawn(pipe: UniDiffPipeline, cases: CaptionedPictures, numbers: Sequence[int]) -> list[dict[str, Any]]:
    """Draw, judge and score the pictures of some prompts."""
    assert cases.shows is not None
    words = [cases.prompts[number] for number in numbers for _ in range(COUNT)]
    own = row_seeds(cases.seed, len(cases.prompts))[list(numbers)]
    seeds = candidate_seeds(own, COUNT).tolist()
    how: dict[str, Any] = {"generator": seeds, "output_type": "pt", "num_candidates": 1}
    out = pipe.text_to_image(words, **cases.options, **how)
    right = cases.shows(words, torch.as_tensor(out.images))
    masks = own.repeat_interleave(COUNT).tolist()  # the pictures of a prompt are hidden alike
    found = pipe.score(
        texts=words, codes=out.codes, of="each", samples=SAMPLES, generator=masks, batch_size=cases.batch_size
    )
    columns = {"right": right, "text": found.text.tolist(), "image": found.image.tolist(), "seeds": seeds}
    cut = lambda values, place: list(values[place * COUNT : (place + 1) * COUNT])  # noqa: E731
    return [{"number": n, **{k: cut(v, place) for k, v in columns.items()}} for place, n in enumerate(numbers)]


def _column(rows: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
    return np.array([row[name] for row in rows], np.float64)


def gains(right: np.ndarray, scores: Mapping[str, np.ndarray]) -> dict[str, Estimate | float]:
    """Shares from what was right, bool `[N, n]`, and scores by name, float64 `[N, n]`; the first wins ties.

    `closes_*` has the interval of a ratio of means by the delta method (Oehlert 1992); NaN where the pictures of every prompt are
    all right or all wrong.
    """
    one, best = right.mean(1), right.max(1)
    found: dict[str, Estimate | float] = {
        "reranking.one": Estimate.mean(one),
        "reranking.best": Estimate.share(list(best)),
    }
    for name, parts in KEPT.items():
        total = sum((scores[part] for part in parts), np.zeros(right.shape))
        kept = right[np.arange(len(right)), total.argmax(1)]
        found[f"reranking.{name}"] = Estimate.share(list(kept))
        found[f"reranking.closes_{name}"] = ratio_of_means(kept - one, best - one)
    return found


def ratio_of_means(above: np.ndarray, below: np.ndarray) -> Estimate:
    """mean(above) / mean(below) with its 95 % interval by the delta method."""
    if not below.any():
        return Estimate(np.nan, np.nan, np.nan, len(below))
    ratio = above.mean() / below.mean()
    half = Z95 * (above - ratio * below).std(ddof=1) / len(below) ** 0.5 / below.mean() if len(below) > 1 else np.inf
    return Estimate(float(ratio), float(ratio - half), float(ratio + half), len(below))


RERANKING = Metric("reranking", reranking, rounds=1)
