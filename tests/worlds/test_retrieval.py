"""Wrong captions are wrong, of the grammar, and one phrase away; retrieval finds the right one by a model that knows it."""

import random
from types import SimpleNamespace

import pytest
import torch

from unidiff.evaluation.metrics.base import METRICS, CaptionedPictures
from unidiff.worlds.emoji.cases import wrong_captions
from unidiff.worlds.emoji.evaluation import DISTRACTORS, captioned_scenes, captions
from unidiff.worlds.emoji.language import facts_hold, parse_caption
from unidiff.worlds.emoji.scenes import get_profile

PROFILE = get_profile("cpu")


def common(first: list[str], second: list[str]) -> int:
    """How many words two lists begin with alike."""
    return next((i for i, (a, b) in enumerate(zip(first, second)) if a != b), min(len(first), len(second)))


def test_wrong_captions_do_not_hold_and_differ_in_one_phrase():
    for number, (scene, caption) in enumerate(captioned_scenes(150, 4, PROFILE)):
        wrong = wrong_captions(caption, scene, PROFILE.names, 10, random.Random(number))
        assert len(wrong) == len(set(wrong)) == 10 and caption not in wrong
        assert wrong == wrong_captions(caption, scene, PROFILE.names, 10, random.Random(number))
        own = caption.split()
        for other in wrong:
            facts = parse_caption(other, PROFILE.names)
            assert facts is not None and not facts_hold(facts, scene)
            words = other.split()
            start = common(own, words)
            end = common(own[start:][::-1], words[start:][::-1])
            changed = [len(own) - start - end, len(words) - start - end]
            assert max(changed) <= 5  # words of one phrase: "in the bottom right corner"


def pipe_that_likes(right: set[str]):
    def score(images, texts, **more):
        assert len(images) == len(texts) == len(more["generator"])
        draws = torch.tensor([[-float(text not in right) for text in texts]] * 2, dtype=torch.float64)
        return SimpleNamespace(draws=draws, count_text=torch.ones(len(texts)), count_image=torch.zeros(len(texts)))

    return SimpleNamespace(score=score)


def test_retrieval_is_the_share_of_captions_that_come_first():
    cases = captions(8, 0, PROFILE)
    assert all(len(wrong) == DISTRACTORS for wrong in cases.distractors)
    measure = METRICS["retrieval"].measure
    assert measure(pipe_that_likes(set(cases.captions)), cases)["retrieval"].value == 1
    assert measure(pipe_that_likes(set(cases.captions[:2])), cases)["retrieval"].value == 2 / 8
    assert measure(pipe_that_likes(set()), cases)["retrieval"].value == 0  # a tie is no find
    with pytest.raises(ValueError, match="distractors"):
        measure(pipe_that_likes(set()), CaptionedPictures(cases.captions, cases.pictures))
