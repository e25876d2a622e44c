"""Every caption parses back to facts that hold; wrong ones do not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from unidiff.worlds.emoji.language import (
    Facts,
    caption_distribution,
    facts_complete,
    facts_correct,
    facts_hold,
    parse_caption,
)
from unidiff.worlds.emoji.scenes import KINDS, LARGE, MEDIUM, Scene, SceneGenerator, SceneObject, get_profile

FOX = Scene((SceneObject("fox", 0, 4, LARGE),), "red")
PAIR = Scene((SceneObject("fox", 1, 0, LARGE), SceneObject("bear", 1, 4, LARGE)), "blue")
GROUP = Scene(
    (SceneObject("fox", 0, 0, MEDIUM), SceneObject("fox", 0, 4, MEDIUM), SceneObject("owl", 4, 0, MEDIUM)), "gray"
)


@pytest.mark.parametrize("profile", ["cpu", "gpu"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_caption_parses_back_to_its_scene(profile: str, kind: str) -> None:
    generator = SceneGenerator(get_profile(profile), seed=3, split="all")
    for index in range(60):
        scene = generator.scene(index, kind)
        without_ground = 0.0
        for caption, probability in caption_distribution(scene).items():
            facts = parse_caption(caption, generator.profile.names)
            assert facts is not None, caption
            assert facts_hold(facts, scene), caption
            assert facts_complete(facts, scene), caption
            without_ground += probability * (facts.background is None)
        assert without_ground == pytest.approx(0.1)


def test_every_name_is_read_in_every_number() -> None:
    names = get_profile("gpu").names
    for name in names:
        for n in range(1, 6):
            scene = Scene(tuple(SceneObject(name, 0, 0, 2) for _ in range(n)), "red")
            for caption in caption_distribution(scene):
                facts = parse_caption(caption)
                assert facts is not None and facts.counts == ((name, n),), caption


def test_parts_are_read() -> None:
    facts = parse_caption("a picture of a large fox at the top right on a red background")
    assert facts == Facts((("fox", 1),), "large", "top right", None, "red")
    facts = parse_caption("a fox to the left of a bear against a blue background")
    assert facts == Facts((("fox", 1), ("bear", 1)), relation=("fox", "left of", "bear"), background="blue")
    assert parse_caption("two foxes and an owl") == Facts((("fox", 2), ("owl", 1)))
    assert parse_caption("a red apple on red") == Facts((("red apple", 1),), background="red")


@pytest.mark.parametrize(
    "text",
    ["", "fox", "a foxes", "a fox on a pink background", "two fox", "a fox and", "a fox and a fox", "a fox above a fox",
     "a picture of", "a fox, a bear, an owl", "a large fox and a bear", "nonsense", "three foxes at the top"],
)  # fmt: skip
def test_sentences_outside_the_grammar_are_not_read(text: str) -> None:
    assert parse_caption(text) is None


def test_names_outside_the_profile_are_not_read() -> None:
    assert parse_caption("a taxi") is not None
    assert parse_caption("a taxi", get_profile("cpu").names) is None


@pytest.mark.parametrize(
    ("caption", "scene"),
    [
        ("a bear", FOX),
        ("two foxes", FOX),
        ("a small fox", FOX),
        ("a fox at the top left", FOX),
        ("a fox on blue", FOX),
        ("a fox to the right of a bear", PAIR),
        ("a fox above a bear", PAIR),
        ("a fox and an owl", PAIR),
        ("a fox and an owl", GROUP),
        ("two foxes and an owl on red", GROUP),
    ],
)
def test_false_facts_do_not_hold(caption: str, scene: Scene) -> None:
    facts = parse_caption(caption)
    assert facts is not None
    assert not facts_hold(facts, scene)
    assert not facts_correct(facts, scene)


@pytest.mark.parametrize(
    ("caption", "scene"), [("a fox", PAIR), ("a bear on a blue background", PAIR), ("two foxes", GROUP)]
)
def test_true_but_incomplete(caption: str, scene: Scene) -> None:
    facts = parse_caption(caption)
    assert facts is not None
    assert facts_hold(facts, scene)
    assert not facts_complete(facts, scene)


def test_unreadable_is_never_correct() -> None:
    assert not facts_correct(None, FOX)
    assert not facts_correct(parse_caption("a fox"), None)
    assert facts_correct(parse_caption("a fox"), replace(FOX, background="green"))
