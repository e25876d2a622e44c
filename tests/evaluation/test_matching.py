"""Winoground's scores and multiple choice: by hand on given draws, through a tiny pipeline, and on an exact toy."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_pipeline import SIZE, tiny_pipeline

from unidiff.evaluation.matching import LENGTHS, MatchScores, match, multiple_choice

TEXTS = ["a dog", "two cats", "an owl above a fox"]


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


@pytest.fixture(scope="module")
def pictures():
    return torch.rand(4, 3, *SIZE, generator=torch.Generator().manual_seed(0))


def test_winoground_scores_by_hand():
    """Scores by picture (down) and text (across): all right, text alone, image alone, neither."""
    scores = torch.tensor(
        [[[3.0, 1.0], [2.0, 4.0]], [[3.0, 2.0], [5.0, 6.0]], [[3.0, 4.0], [1.0, 5.0]], [[1.0, 1.0], [1.0, 1.0]]]
    ).double()
    found = MatchScores(torch.stack([scores - 1, scores + 1]))
    assert [found.text.value, found.image.value, found.group.value] == [2 / 4, 2 / 4, 1 / 4]
    assert found.text.low < 0.5 < found.text.high and found.text.n == 4
    assert found.margins().value.tolist() == [[2, 2], [1, 1], [-1, 4], [0, 0]]
    assert found.margins("image").value.tolist() == [[1, 3], [-2, 4], [2, 1], [0, 0]]
    assert float(found.margins().high.max()) == 4  # both draws shift all scores alike: differences are sure
    with pytest.raises(ValueError, match="rivals"):
        found.margins("words")


def test_matching_is_the_scores_of_all_pairs(pipe, pictures):
    groups, texts = [pictures[:2], pictures[2:]], [TEXTS[:2], TEXTS[1:]]
    for how in ({"of": "text"}, {"of": "image", "pmi": True}, {"of": "each"}):
        found = match(pipe, groups, texts, samples=4, generator=[5, 6], batch_size=3, **how)
        assert found.scores.shape == (2, 2, 2)
        for g, i, t in ((0, 0, 1), (1, 1, 0), (1, 1, 1)):
            own = pipe.score(groups[g][i], texts[g][t], samples=4, generator=[5 + g], **how)
            torch.testing.assert_close(found.scores[g, i, t], own.log_prob[0], rtol=1e-5, atol=1e-5)
    pair = match(pipe, [pictures[:2]], [["a dog", "a dog"]], samples=3)
    assert pair.text.value == 0  # a tie is no find
    for images, words in (([pictures[:2]], [TEXTS]), ([], []), ([pictures[:2]], [TEXTS[:2]] * 2)):
        with pytest.raises(ValueError, match="give as many of each"):
            match(pipe, images, words)


def test_choices_are_scored_by_the_same_masks_and_divided_as_asked(pipe, pictures):
    choices = [["a dog", "an owl above a fox", "a dog"], ["two cats", "a dog"]]
    for normalise in LENGTHS:
        found = multiple_choice(pipe, choices, pictures[:2], samples=4, normalise=normalise, generator=[7, 8])
        for question, own in enumerate(choices):
            parts = pipe.score(pictures[question], own, of="text", samples=4, generator=[7 + question] * len(own))
            lengths = [LENGTHS[normalise](text, int(n)) for text, n in zip(own, parts.count_text, strict=True)]
            expected = parts.log_prob / torch.tensor(lengths, dtype=torch.float64)
            torch.testing.assert_close(torch.tensor(found.scores[question]).double(), expected, rtol=1e-5, atol=1e-5)
            assert int(found.best[question]) == int(expected.argmax())
            top = expected.sort(descending=True).values
            torch.testing.assert_close(found.margin.value[question], top[0] - top[1], rtol=1e-4, atol=1e-4)
        assert found.scores[0][0] == found.scores[0][2]
        assert bool((found.margin.low <= found.margin.value).all())
    right = found.accuracy([1, int(found.best[1])])
    assert right.n == 2 and right.value in (0.5, 1.0)
    assert found.accuracy([0, 1 - int(found.best[1])]).value == 0  # the first question has a tie there


def test_lengths_count_what_they_say():
    assert [LENGTHS[name]("käse", 3) for name in ("sum", "token", "character", "byte")] == [1, 3, 4, 5]


@pytest.mark.parametrize(
    "given, sentence",
    [
        ({"choices": []}, "at least two choices"),
        ({"choices": [["a dog"]]}, "at least two choices"),
        ({"choices": [["a dog", "two cats"]] * 2}, "2 questions need as many images"),
        ({"choices": [["a dog", "two cats"]], "normalise": "word"}, "normalise is 'word'"),
    ],
)
def test_bad_questions_are_one_sentence(pipe, pictures, given, sentence):
    with pytest.raises(ValueError, match=sentence):
        multiple_choice(pipe, images=pictures[:1], **given)


def test_one_picture_is_read_once(pipe, pictures, monkeypatch):
    read = []
    encode = pipe.images.encode
    monkeypatch.setattr(pipe.images, "encode", lambda pixels: read.append(len(pixels)) or encode(pixels))
    first, second = list(pictures[:2])
    again = pipe.score([first, second, first], TEXTS, samples=2, generator=[1, 2, 3])
    assert read == [2]
    apart = pipe.score(torch.stack([first, second, first]), TEXTS, samples=2, generator=[1, 2, 3])
    torch.testing.assert_close(again.log_prob, apart.log_prob)
    assert math.isfinite(float(again.log_prob.sum()))
