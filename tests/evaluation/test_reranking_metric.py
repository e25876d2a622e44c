"""Best of n by likelihood: the shares by hand, ratios and their intervals, and a run that was stopped goes on."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_pipeline import tiny_pipeline

from unidiff.evaluation.metrics.base import METRICS, CaptionedPictures
from unidiff.evaluation.metrics.reranking import COUNT, PROMPTS, gains, ratio_of_means

measure = METRICS["reranking"].measure
WORDS = ["a dog", "two cats", "an owl"] * 6


def bright(texts, pictures):
    assert len(texts) == len(pictures)
    return (pictures.mean((1, 2, 3)) > 0.5).tolist()


@pytest.fixture
def cases(tmp_path):
    return CaptionedPictures(
        [], lambda a, b: torch.zeros(0), prompts=WORDS, shows=bright, folder=tmp_path / "reranking", seed=3
    )


def test_shares_by_hand():
    right = np.array([[True, False], [False, True], [False, False], [True, True]])
    text = np.array([[0.0, 1.0], [1.0, 2.0], [0.0, 1.0], [5.0, 5.0]])  # keeps: wrong, right, wrong, right
    image = np.array([[4.0, 0.0], [1.0, 1.5], [0.0, 0.0], [0.0, 0.0]])  # keeps: right, right, wrong, right
    found = gains(right, {"text": text, "image": image})
    values = {key.removeprefix("reranking."): float(getattr(value, "value", value)) for key, value in found.items()}
    assert values == {
        **{"one": 0.5, "best": 0.75, "text": 0.5, "image": 0.75, "each": 0.75},
        **{"closes_text": 0, "closes_image": 1, "closes_each": 1},
    }


def test_a_ratio_of_means_has_an_interval_that_holds_it():
    rng, held = np.random.default_rng(0), 0
    for _ in range(400):
        below = rng.random(200) < 0.3
        above = below & (rng.random(200) < 0.6)
        found = ratio_of_means(above.astype(float), below.astype(float))
        held += found.low <= 0.6 <= found.high
    assert 0.9 * 400 <= held <= 0.99 * 400
    assert np.isnan(ratio_of_means(np.zeros(3), np.zeros(3)).value)


def test_a_run_that_was_stopped_ends_with_the_same_numbers(cases):
    pipe = tiny_pipeline(text_length=16)
    whole = measure(pipe, cases)
    lines = cases.folder / "manifest.jsonl"
    head, *rows = lines.read_text().splitlines()
    assert len(rows) == len(WORDS) > PROMPTS and all(len(json.loads(row)["right"]) == COUNT for row in rows)
    lines.write_text("\n".join([head, *rows[:5], rows[5][:20]]))  # killed while it wrote
    assert measure(pipe, cases) == whole
    assert sorted(json.loads(row)["number"] for row in lines.read_text().splitlines()[1:] if row.endswith("}")) == list(
        range(len(WORDS))
    )
    assert measure(pipe, replace(cases, folder=None)) == whole
    with pytest.raises(ValueError, match="seed = 3, here 4; use the same"):
        measure(pipe, replace(cases, seed=4))
    with pytest.raises(ValueError, match="needs prompts"):
        measure(pipe, replace(cases, shows=None))
