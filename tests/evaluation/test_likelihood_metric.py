"""Likelihoods of a model that knows the grammar exactly, and of one that cheats."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from unidiff.evaluation.metrics.likelihood import RowLikelihood, captioned_rows
from unidiff.evaluation.report import EvaluationReport
from unidiff.tokens import Modality, TokenBatch, Vocabulary
from unidiff.worlds.emoji.evaluation import captioned_scenes, captions
from unidiff.worlds.emoji.language import caption_distribution
from unidiff.worlds.emoji.scenes import get_profile

N, LENGTH, CODES = 20, 20, 8
CASES = captioned_scenes(N, seed=2, profile=get_profile("cpu"))
DRAWN = captions(N, 2, get_profile("cpu"))
OPTIONS = [caption_distribution(scene) for scene, _ in CASES]
WORDS = sorted({word for options in OPTIONS for caption in options for word in caption.split(" ")})
VOCABULARY = Vocabulary.unified(2 + len(WORDS), CODES, {"caption": 0, "eos": 1})


def encode(caption: str) -> list[int]:
    ids = [0, *(2 + WORDS.index(word) for word in caption.split(" "))]
    return ids + [1] * (LENGTH - len(ids))


ROWS = captioned_rows(DRAWN.captions, torch.zeros(N, 2, 2, dtype=torch.long), encode, VOCABULARY)


class ExactModel:
    """The true conditional distribution of every hidden caption token given the visible ones and the scene; uniform
    image codes. A row's scene is found by its picture, here by its caption, which the toy looks up in `x0`."""

    def __init__(self) -> None:
        self.tables = [torch.tensor([encode(caption) for caption in options]) for options in OPTIONS]
        self.weights = [torch.tensor(list(options.values()), dtype=torch.float64) for options in OPTIONS]
        self.rows = {tuple(ids): i for i, ids in enumerate(ROWS.ids[:, :LENGTH].tolist())}

    def __call__(self, x_t: TokenBatch, x0: TokenBatch, where: Tensor) -> Tensor:
        nll = torch.where(where, math.log(CODES), 0.0).double()  # image codes
        for b, ids in enumerate(x0.ids[:, :LENGTH].tolist()):
            row = self.rows[tuple(ids)]
            table, weights = self.tables[row], self.weights[row]
            visible = x_t.ids[b, :LENGTH] != VOCABULARY.mask_id
            weights = weights * (~visible | (table == x_t.ids[b, :LENGTH])).all(1)
            same = (table == x0.ids[b, :LENGTH]).double()  # [captions, LENGTH]
            share = (weights[:, None] * same).sum(0) / weights.sum()
            nll[b, :LENGTH] = torch.where(where[b, :LENGTH], -share.log(), 0.0)
        return nll


def judged(score, samples: int) -> EvaluationReport:
    report = EvaluationReport()
    judge = RowLikelihood(score, VOCABULARY, samples=samples)
    for key, value in judge.numbers(ROWS, 1, DRAWN.surprises, DRAWN.entropies).items():
        report.add(key, value)
    return report


@pytest.fixture(scope="module")
def report() -> EvaluationReport:
    return judged(ExactModel(), samples=40)


def test_an_exact_model_reaches_the_entropy_and_not_less(report: EvaluationReport) -> None:
    gap = report.intervals["caption_gap"]
    half = gap.high - gap.value
    assert half < 0.4
    assert abs(gap.value) < 2 * half  # about four standard errors
    nelbo, entropy = report.intervals["caption_nelbo"], report.values["caption_entropy"]
    assert nelbo.low < entropy < nelbo.high
    assert 3 < entropy < 6


def test_a_model_that_sees_its_target_falls_below_the_entropy() -> None:
    exact = ExactModel()
    report = judged(lambda x_t, x0, where: 0.5 * exact(x_t, x0, where), samples=12)
    assert report.intervals["caption_gap"].high < 0


def test_joint_nelbo_is_split_by_modality(report: EvaluationReport) -> None:
    values = report.values
    assert values["image_nelbo"] == pytest.approx(4 * math.log(CODES), rel=1e-6)  # exact: every mask costs the same
    assert values["joint_nelbo"] == pytest.approx(values["joint_nelbo_text"] + values["joint_nelbo_image"])
    interval = report.intervals["joint_nelbo_image"]
    assert abs(interval.value - 4 * math.log(CODES)) <= interval.high - interval.low  # twice its half-width


def test_without_the_fill_nothing_is_paid_for_the_length(report: EvaluationReport) -> None:
    assert report.values["caption_nelbo_words"] < report.values["caption_nelbo"]


def test_batch_size_does_not_change_the_estimate() -> None:
    rows = ROWS.replace(given=ROWS.given | (ROWS.modality == Modality.IMAGE))
    one = RowLikelihood(ExactModel(), VOCABULARY, samples=2, batch_size=N).nelbo(rows)
    many = RowLikelihood(ExactModel(), VOCABULARY, samples=2, batch_size=5).nelbo(rows)
    assert torch.equal(one.total, many.total)


def test_scenes_and_captions_are_fixed_by_the_seed() -> None:
    profile = get_profile("cpu")
    assert captioned_scenes(5, 2, profile) == CASES[:5]
    assert captioned_scenes(5, 3, profile) != CASES[:5]
    shares = [options[caption] for options, (_, caption) in zip(OPTIONS, CASES, strict=True)]
    assert shares == pytest.approx([math.exp(-surprise) for surprise in DRAWN.surprises])
