"""Captions have the distribution they claim; questions are balanced and their answers true."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest

from unidiff.worlds.emoji.cases import question_kind
from unidiff.worlds.emoji.language import (
    NUMBERS,
    RELATIONS,
    caption_distribution,
    caption_entropy,
    draw_caption,
    draw_question,
    plural,
    relation,
    zone,
)
from unidiff.worlds.emoji.scenes import KINDS, LARGE, MEDIUM, Scene, SceneGenerator, SceneObject, get_profile

CPU = get_profile("cpu")
GENERATOR = SceneGenerator(CPU, 9, "all")
FOX = Scene((SceneObject("fox", 0, 0, LARGE),), "red")


@pytest.mark.parametrize("kind", KINDS)
def test_probabilities_sum_to_one_and_give_the_entropy(kind: str) -> None:
    for i in range(40):
        scene = GENERATOR.scene(i, kind)
        p = list(caption_distribution(scene).values())
        assert min(p) > 0 and sum(p) == pytest.approx(1.0, abs=1e-12)
        assert caption_entropy(scene) == pytest.approx(-sum(x * math.log(x) for x in p), abs=1e-12)


def test_entropy_of_one_scene_by_hand() -> None:
    def entropy(*p: float) -> float:
        return -sum(x * math.log(x) for x in p)

    openers, grounds = math.log(3), entropy(0.1, *[0.9 / 4] * 4)
    assert caption_entropy(FOX) == pytest.approx(openers + grounds + entropy(0.8, 0.2) + entropy(0.4, 0.3, 0.3))
    three = Scene(tuple(SceneObject("fox", 0, 4 * i, MEDIUM) for i in range(2)), "red")
    assert caption_entropy(three) == pytest.approx(openers + grounds)


def test_drawn_captions_follow_the_distribution() -> None:
    rng, expected = random.Random(0), caption_distribution(FOX)
    drawn = Counter(draw_caption(FOX, rng) for _ in range(4000))
    assert set(drawn) <= set(expected)
    chi2 = sum((drawn[c] - 4000 * p) ** 2 / (4000 * p) for c, p in expected.items())
    assert chi2 < len(expected) + 4 * math.sqrt(2 * len(expected))


def test_captions_of_different_scenes_differ_in_what_they_must() -> None:
    bear = Scene((SceneObject("bear", 0, 0, LARGE),), "red")
    assert not set(caption_distribution(FOX)) & set(caption_distribution(bear))


def test_zones_and_relations() -> None:
    last = 8 - LARGE
    assert zone(SceneObject("fox", 0, 0, LARGE)) == "top left"
    assert zone(SceneObject("fox", 2, last, LARGE)) == "right"
    assert zone(SceneObject("fox", 1, 1, LARGE)) == "centre"
    for first, second, where in (((0, 0), (0, 4), "left of"), ((0, 0), (4, 0), "above"), ((4, 1), (0, 0), "below")):
        a, b = SceneObject("fox", *first, LARGE), SceneObject("bear", *second, LARGE)
        assert (
            relation(a, b) == where
            and relation(b, a)
            == {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}[where]
        )


def _true_answer(question: str, scene: Scene) -> str:
    """The answer worked out from the question's words alone."""
    kind = question_kind(question)
    if kind == "colour":
        return scene.background
    if kind == "what":
        (name,) = scene.counts
        return name
    if kind == "where":
        return zone(scene.objects[0])
    if kind == "number":
        (n,) = [n for name, n in scene.counts.items() if f"how many {plural(name)} are there?" == question]
        return NUMBERS[n]
    if kind == "exists":
        asked = question.removeprefix("is there ").removesuffix("?").removeprefix("an ").removeprefix("a ")
        return "yes" if asked in scene.counts else "no"
    if kind == "related":
        for a in scene.objects:
            for b in scene.objects:
                claimed = [r for r in RELATIONS if question == f"is the {a.name} {RELATIONS[r][0]} the {b.name}?"]
                if claimed:
                    return "yes" if relation(a, b) == claimed[0] else "no"
    side = {"left": "left of", "right": "right of", "top?": "above", "bottom?": "below"}
    (where,) = [r for word, r in side.items() if word in question]
    (found,) = [a.name for a in scene.objects for b in scene.objects if a is not b and relation(a, b) == where]
    return found


@pytest.fixture(scope="module")
def asked() -> list[tuple[Scene, str, str]]:
    rng, cases = random.Random(1), []
    for i in range(3000):
        scene = GENERATOR.scene(i)
        cases.append((scene, *draw_question(scene, CPU, rng)))
    return cases


def test_every_answer_is_true(asked: list[tuple[Scene, str, str]]) -> None:
    for scene, question, answer in asked:
        assert answer == _true_answer(question, scene), question


def test_yes_and_no_and_numbers_are_balanced(asked: list[tuple[Scene, str, str]]) -> None:
    for kind in ("exists", "related"):
        answers = Counter(a for _, q, a in asked if question_kind(q) == kind)
        assert abs(answers["yes"] / answers.total() - 0.5) < 4 * 0.5 / math.sqrt(answers.total()), kind
    numbers = Counter(a for _, q, a in asked if question_kind(q) == "number")
    assert set(numbers) == set(NUMBERS.values())
    assert all(0.12 < n / numbers.total() < 0.3 for n in numbers.values()), numbers
