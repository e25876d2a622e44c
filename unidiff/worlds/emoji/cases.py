"""The cases of EmojiEval: prompts, pictures to describe, questions and holes, fixed by the seed.

Every case is a pure function of (profile, task, seed, number); another seed gives others. Scenes come from the training
split's distribution (its held-out compositions never occur in training) under seeds that training does not use.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import count, product, zip_longest

from unidiff.errors import reading
from unidiff.worlds.asked import HoledCaption
from unidiff.worlds.emoji.language import (
    NUMBERS,
    RELATIONS,
    ZONE_PHRASES,
    Facts,
    article,
    counted,
    draw_caption,
    draw_question,
    facts_hold,
    parse_caption,
    sized,
)
from unidiff.worlds.emoji.scenes import ATLAS_FOLDER, BACKGROUNDS, KINDS, Profile, Scene, SceneGenerator, SceneObject

CATEGORIES = ("single_object", "two_objects", "counting", "background", "position", "composition")
HELD_OUT = "held_out_composition"
_STARTS = {
    "is there ": "exists",
    "how many ": "number",
    "what colour ": "colour",
    "what is in the picture": "what",
    "is the ": "related",
    "where is ": "where",
}
QUESTION_KINDS = (*_STARTS.values(), "side")


@dataclass(frozen=True)
class PromptCase:
    """A prompt, what it states, and the scene it was written for (any scene that bears out the facts is right)."""

    prompt: str
    facts: Facts
    scene: Scene


@dataclass(frozen=True)
class QuestionCase:
    """A question about the picture of a scene and its one right answer."""

    kind: str
    scene: Scene
    question: str
    answer: str


@dataclass(frozen=True)
class InpaintCase(HoledCaption):
    """A picture of two objects, the one to be repainted (`hole`), and the caption, which names it.

    `before, name, after` is the caption around the name of the *visible* object, which is hidden too; `name` is empty
    where the caption is given in full.
    """

    scene: Scene
    hole: SceneObject
    caption: str
    before: str
    name: str
    after: str


_CATEGORIES: dict[str, tuple[tuple[str, ...], Callable[[Facts], bool]]] = {
    "single_object": (("single",), lambda f: f.zone is None and f.size is None),
    "two_objects": (("pair",), lambda f: f.relation is None),
    "counting": (("count",), lambda f: True),
    "background": (KINDS, lambda f: f.background is not None),
    "position": (("single", "pair"), lambda f: f.zone is not None or f.relation is not None),
    "composition": (("pair", "group"), lambda f: f.background is not None),
    HELD_OUT: (KINDS, lambda f: f.background is not None),
}
"""Kinds of scenes, and what a caption has to state."""


def task_seed(task: str, seed: int) -> int:
    """A generator seed of its own for each task, away from the small seeds that training uses."""
    return int.from_bytes(hashlib.sha256(f"emoji eval|{task}|{seed}".encode()).digest()[:6], "big") | 1 << 48


def scenes(task: str, kinds: tuple[str, ...], n: int, seed: int, profile: Profile, split: str = "train") -> list[Scene]:
    """`n` scenes, the kinds in turn."""
    generator = SceneGenerator(profile, task_seed(task, seed), split)
    return [generator.scene(i, kinds[i % len(kinds)]) for i in range(n)]


def prompt_cases(category: str, n: int, seed: int, profile: Profile) -> list[PromptCase]:
    """Prompts drawn from the captions that state what a category asks for. Raises `ValueError`: an unknown one."""
    if category not in _CATEGORIES:
        raise ValueError(f"unknown category {category!r}; expected one of {', '.join(_CATEGORIES)}")
    (kinds, wanted), split = _CATEGORIES[category], "held_out" if category == HELD_OUT else "train"
    drawn = scenes(category, kinds, n, seed, profile, split)
    rng = [random.Random(f"prompt|{category}|{seed}|{i}") for i in range(n)]
    return [PromptCase(*_stating(scene, own, wanted, profile), scene) for scene, own in zip(drawn, rng, strict=True)]


def _stating(scene: Scene, rng: random.Random, wanted: Callable[[Facts], bool], profile: Profile) -> tuple[str, Facts]:
    """A caption that states what is wanted, and its facts."""
    while True:
        caption = draw_caption(scene, rng)
        facts = parse_caption(caption, profile.names)
        if facts is not None and wanted(facts):
            return caption, facts


def caption_scenes(kind: str, n: int, seed: int, profile: Profile) -> list[Scene]:
    """Pictures of one kind to describe."""
    return scenes(f"caption {kind}", (kind,), n, seed, profile)


def question_cases(n: int, seed: int, profile: Profile) -> list[QuestionCase]:
    """Questions of all kinds in turn; yes and no alternate within their kinds, the numbers take turns too."""
    generator = SceneGenerator(profile, task_seed("answer", seed))
    fresh = count()  # numbers of scenes not used yet
    cases = []
    for i in range(n):
        kind, turn = QUESTION_KINDS[i % len(QUESTION_KINDS)], i // len(QUESTION_KINDS)
        wanted, places = _wanted_answer(kind, turn)
        while True:
            number = next(fresh)
            scene = generator.scene(number, places[turn % len(places)])
            rng = generator.rng(number, "question")
            question, answer = draw_question(scene, profile, rng)
            if question_kind(question) == kind and wanted in (None, answer):
                break
        cases.append(QuestionCase(kind, scene, question, answer))
    return cases


def _wanted_answer(kind: str, turn: int) -> tuple[str | None, tuple[str, ...]]:
    """The answer that is this question's turn, None for any, and the kinds of scene that allow it."""
    if kind in ("exists", "related"):
        return ("yes", "no")[turn % 2], KINDS if kind == "exists" else ("pair",)
    if kind == "number":
        wanted = NUMBERS[1 + turn % len(NUMBERS)]
        return wanted, ("single",) if wanted == "one" else ("count",)
    return None, {"colour": KINDS, "what": ("single", "count"), "where": ("single",), "side": ("pair",)}[kind]


def question_kind(question: str) -> str:
    """Which of `QUESTION_KINDS` a question is."""
    return next((kind for start, kind in _STARTS.items() if question.startswith(start)), "side")


def inpaint_cases(n: int, seed: int, profile: Profile) -> list[InpaintCase]:
    """Holes in pictures of two objects: in turn with the whole caption, and with the visible object's name hidden."""
    cases = []
    for i, scene in enumerate(scenes("inpaint", ("pair",), n, seed, profile)):
        rng = random.Random(f"inpaint|{seed}|{i}")
        hole, seen = rng.sample(scene.objects, 2)
        caption, _ = _stating(scene, rng, lambda f: f.relation is not None, profile)
        before, name, after = caption, "", ""
        if i % 2:
            head, phrase, after = _around(caption, article(seen.name), article(hole.name))
            before, name = head + phrase.removesuffix(seen.name), seen.name
        cases.append(InpaintCase(scene, hole, caption, before, name, after))
    return cases


def _around(caption: str, phrase: str, other: str) -> tuple[str, str, str]:
    """Split a caption at a phrase, but not inside the other object's phrase (`a fire` in `a fire engine`)."""
    taken = caption.index(other)
    for match in re.finditer(rf"(?<!\w){re.escape(phrase)}(?!\w)", caption):
        if not taken <= match.start() < taken + len(other):
            return caption[: match.start()], phrase, caption[match.end() :]
    raise ValueError(f"{phrase!r} is not in {caption!r}")


@cache
def phrasings() -> dict[str, tuple[Facts, ...]]:
    """Prompts as people might write them, and the facts that they may mean: a plural without a number is any from two to five."""
    path = ATLAS_FOLDER / "phrasings.jsonl"
    found = {}
    with reading(path, "prompts as people might write them"):
        for row in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
            numbers = [range(2, len(NUMBERS) + 1) if number == 0 else (number,) for number in row["counts"].values()]
            relation = tuple(row["relation"]) if row.get("relation") else None
            more = row.get("size"), row.get("zone"), relation, row.get("background")
            found[row["text"]] = tuple(
                Facts(tuple(zip(row["counts"], of, strict=True)), *more) for of in product(*numbers)
            )
    return found


def stated(prompt: str) -> Sequence[Facts]:
    """What a prompt may say: one of `phrasings`, or a caption of the grammar; nothing where it is neither."""
    facts = parse_caption(prompt)
    return phrasings().get(prompt, ()) if facts is None else (facts,)


def wrong_captions(caption: str, scene: Scene, names: Sequence[str], count: int, rng: random.Random) -> list[str]:
    """`count` captions that differ from a true one in one phrase (name, number, size, place, relation or background, in
    turns) and do not hold for the scene; fewer where there are no more. `names` are those that objects may have.
    """
    facts = parse_caption(caption)
    assert facts is not None  # a caption of the grammar
    kinds = []
    for swaps in _swaps(facts, caption, names):
        changed = [caption.replace(before, after, 1) for before, after in swaps]
        stated = {other: parse_caption(other) for other in changed}
        wrong = [other for other, said in stated.items() if said is not None and not facts_hold(said, scene)]
        kinds.append(rng.sample(wrong, len(wrong)))
    turns = [other for turn in zip_longest(*kinds) for other in turn if other is not None]
    return list(dict.fromkeys(turns))[:count]


def _swaps(facts: Facts, caption: str, names: Sequence[str]) -> Iterator[list[tuple[str, str]]]:
    """Phrases of a caption, each with others of its kind; a list for each kind."""
    size = facts.size
    said = (lambda name, n: sized(name, f"{size} ")) if size else counted
    unnamed = [name for name in names if name not in dict(facts.counts)]
    yield [(said(name, n), said(other, n)) for name, n in facts.counts for other in unnamed]
    if size:
        yield [(f"{size} ", f"{other} ") for other in ("large", "small")]
    else:
        yield [(counted(name, n), counted(name, other)) for name, n in facts.counts for other in NUMBERS]
    for table in (ZONE_PHRASES, RELATIONS):
        phrases = [phrase for options in table.values() for phrase in options]
        yield [(one, other) for one in phrases if f" {one} " in f" {caption} " for other in phrases]
    if facts.background is not None:
        yield [(facts.background, other) for other in BACKGROUNDS]
