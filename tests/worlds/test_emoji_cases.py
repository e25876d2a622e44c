"""Prompts, questions and holes: fixed by the seed, balanced, and what their category says."""

from __future__ import annotations

from collections import Counter

import pytest

from unidiff.worlds.emoji.cases import (
    CATEGORIES,
    HELD_OUT,
    QUESTION_KINDS,
    caption_scenes,
    inpaint_cases,
    prompt_cases,
    question_cases,
)
from unidiff.worlds.emoji.language import facts_correct
from unidiff.worlds.emoji.scenes import get_profile, held_out

CPU = get_profile("cpu")


@pytest.mark.parametrize("category", [*CATEGORIES, HELD_OUT])
def test_prompts_are_true_and_fixed_by_the_seed(category: str) -> None:
    cases = prompt_cases(category, 24, 0, CPU)
    assert all(facts_correct(case.facts, case.scene) for case in cases)
    assert all(held_out(case.scene) == (category == HELD_OUT) for case in cases)
    assert cases == prompt_cases(category, 24, 0, CPU)
    assert cases[:10] == prompt_cases(category, 10, 0, CPU)
    assert len({c.prompt for c in cases} & {c.prompt for c in prompt_cases(category, 24, 1, CPU)}) <= 3


def test_categories_ask_for_what_they_are_called() -> None:
    facts = {category: [c.facts for c in prompt_cases(category, 24, 5, CPU)] for category in (*CATEGORIES, HELD_OUT)}
    assert all(f.total == 1 and f.zone is None for f in facts["single_object"])
    assert all(len(f.counts) == f.total == 2 and f.relation is None for f in facts["two_objects"])
    assert all(len(f.counts) == 1 and f.total >= 2 for f in facts["counting"])
    assert all(f.background for key in ("background", "composition", HELD_OUT) for f in facts[key])
    assert all((f.zone is None) != (f.relation is None) for f in facts["position"])
    assert all(len(f.counts) >= 2 for f in facts["composition"])


def test_unknown_category_is_named() -> None:
    with pytest.raises(ValueError, match="unknown category 'texture'"):
        prompt_cases("texture", 1, 0, CPU)


def test_questions_are_balanced() -> None:
    cases = question_cases(210, 3, CPU)
    assert Counter(c.kind for c in cases) == dict.fromkeys(QUESTION_KINDS, 30)
    by_kind = {kind: Counter(c.answer for c in cases if c.kind == kind) for kind in QUESTION_KINDS}
    assert by_kind["exists"] == by_kind["related"] == {"yes": 15, "no": 15}
    assert by_kind["number"] == dict.fromkeys(("one", "two", "three", "four", "five"), 6)
    assert question_cases(10, 3, CPU) == cases[:10]


def test_caption_scenes_are_of_their_kind_and_new_for_another_seed() -> None:
    scenes = caption_scenes("count", 20, 0, CPU)
    assert all(len(s.counts) == 1 and len(s.objects) >= 2 for s in scenes)
    assert scenes == caption_scenes("count", 20, 0, CPU) != caption_scenes("count", 20, 1, CPU)


@pytest.mark.parametrize("profile", ["cpu", "gpu"])
def test_holes_hide_one_object_and_every_other_time_the_name_of_the_other(profile: str) -> None:
    settings = get_profile(profile)
    for i, case in enumerate(inpaint_cases(80, 2, settings)):
        seen = next(o for o in case.scene.objects if o != case.hole)
        assert case.before + case.name + case.after == case.caption
        assert case.name == (seen.name if i % 2 else "")
        assert not case.name or case.hole.name in case.before + case.after
        mask = settings.boxes([case.hole])
        assert (
            mask.sum() == (case.hole.size * settings.unit) ** 2
            and mask[case.hole.row * settings.unit, case.hole.col * settings.unit]
        )
