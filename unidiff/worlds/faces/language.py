"""What is said about faces: captions with their exact distribution, what they state, and questions with answers.

A caption names some facets of a face in a fixed order: hair with its colour, eyes with theirs, and so on. Which facets are named is
drawn uniformly from those choices of at most six that state four to nine attributes, and each is worded in one of two ways, so
that the entropy H(caption | picture) is known exactly.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from functools import lru_cache
from itertools import combinations

from unidiff.worlds.faces.scenes import ATTRIBUTES, NONE, Face

LEAST, MOST = 4, 9  # attributes that a caption states
MOST_FACETS = 6
OPENERS = ("a person with", "someone with", "a face with")
FACETS: dict[str, tuple[str, ...]] = {
    "skin": ("skin",),
    "hair": ("hair", "hair_colour"),
    "eyes": ("eyes", "eye_colour"),
    "mouth": ("mouth",),
    "beard": ("beard",),
    "glasses": ("glasses",),
    "hat": ("hat",),
    "clothing": ("clothing", "clothing_colour"),
    "background": ("background",),
}
"""What is named in one phrase, in the order of a caption."""
_HAIR = {
    NONE: ("a bald head", "no hair"),
    "short": ("short {} hair", "{} hair cut short"),
    "spiky": ("spiky {} hair", "{} hair in spikes"),
    "curly": ("curly {} hair", "{} hair in curls"),
    "bob": ("a {} bob", "a {} bob cut"),
    "long": ("long {} hair", "{} hair worn long"),
    "braids": ("{} braids", "{} hair in braids"),
    "buns": ("{} buns", "{} hair in buns"),
}
_EYES = {
    "big": ("big {} eyes", "wide {} eyes"),
    "ahead": ("{} eyes looking ahead", "{} eyes turned ahead"),
    "left": ("{} eyes looking left", "{} eyes turned left"),
    "right": ("{} eyes looking right", "{} eyes turned right"),
}
_CLOTHING = {
    "plain": ("a {} shirt", "a plain {} shirt"),
    "striped": ("a striped {} shirt", "a {} striped shirt"),
    "checked": ("a checked {} shirt", "a {} checked shirt"),
    "overalls": ("{} overalls", "{} dungarees"),
    "turtleneck": ("a {} turtleneck", "a {} jumper"),
}
_PLAIN: dict[str, dict[str, tuple[str, ...]]] = {
    "skin": {value: (f"{value} skin", f"a {value} face") for value in ATTRIBUTES["skin"]},
    "mouth": {
        "smile": ("a smile", "a smiling mouth"),
        "frown": ("a frown", "a sad mouth"),
        "open": ("an open mouth", "a wide open mouth"),
        "straight": ("a straight mouth", "a serious mouth"),
        "grin": ("a grin", "a toothy grin"),
    },
    "beard": {
        NONE: ("no beard", "a shaved chin"),
        "full": ("a full beard", "a round beard"),
        "goatee": ("a goatee", "a small beard"),
        "long": ("a long beard", "a big long beard"),
    },
    "glasses": {
        NONE: ("no glasses", "without glasses"),
        "black": ("black glasses", "black framed glasses"),
        "red": ("red glasses", "red framed glasses"),
        "sunglasses": ("sunglasses", "dark glasses"),
    },
    "hat": {
        NONE: ("no hat", "without a hat"),
        "cap": ("a red cap", "a cap"),
        "beanie": ("a green beanie", "a beanie"),
        "top hat": ("a top hat", "a black top hat"),
    },
    "background": {value: (f"a {value} background", f"a {value} wall") for value in ATTRIBUTES["background"]},
}
_TINTED = {"hair": _HAIR, "eyes": _EYES, "clothing": _CLOTHING}
Facts = dict[str, str]
"""Stated values by attribute."""


def phrases(facet: str, face: Face) -> tuple[str, ...]:
    """The ways to name one facet of a face, all equally likely."""
    if facet in _TINTED:
        colour = getattr(face, FACETS[facet][1])
        return tuple(phrase.format(colour) for phrase in _TINTED[facet][getattr(face, facet)])
    return _PLAIN[facet][getattr(face, facet)]


def attributes_of(facet: str, face: Face) -> tuple[str, ...]:
    """The attributes that naming a facet states; a bald head has no colour to state."""
    return FACETS[facet] if facet != "hair" or face.hair != NONE else ("hair",)


@lru_cache(maxsize=2)
def _choices(bald: bool) -> tuple[tuple[str, ...], ...]:
    """The sets of facets that a caption may name."""
    weight = {facet: len(attributes) for facet, attributes in FACETS.items()} | ({"hair": 1} if bald else {})
    sets = (chosen for count in range(1, MOST_FACETS + 1) for chosen in combinations(FACETS, count))
    return tuple(chosen for chosen in sets if LEAST <= sum(weight[facet] for facet in chosen) <= MOST)


def choices(face: Face) -> tuple[tuple[str, ...], ...]:
    """The sets of facets that a caption of this face may name, all equally likely."""
    return _choices(face.hair == NONE)


def worded(face: Face, facets: tuple[str, ...], rng: random.Random) -> str:
    """A caption that names these facets."""
    return f"{rng.choice(OPENERS)} {', '.join(rng.choice(phrases(facet, face)) for facet in facets)}"


def draw_caption(face: Face, rng: random.Random) -> str:
    """One caption from the distribution of the grammar."""
    return worded(face, rng.choice(choices(face)), rng)


def caption_entropy(face: Face) -> float:
    """H(caption | face) in nats, exactly."""
    sets = choices(face)
    wording = sum(math.log(len(phrases(facet, face))) for chosen in sets for facet in chosen) / len(sets)
    return math.log(len(sets)) + math.log(len(OPENERS)) + wording


def caption_surprise(caption: str, face: Face) -> float:
    """-log p(caption | face) in nats; infinite where the grammar never says it of this face."""
    facts = parse_caption(caption)
    if facts is None or not facts_hold(facts, face) or len(facts) < LEAST:
        return math.inf
    named = [facet for facet in FACETS if facet in facts]
    wording = sum(math.log(len(phrases(facet, face))) for facet in named)
    return math.log(len(choices(face))) + math.log(len(OPENERS)) + wording


@lru_cache(maxsize=1)
def _readings() -> dict[str, tuple[str, Facts]]:
    """What each phrase states: its facet, and the values."""
    return {phrase: (facet, facts) for phrase, facet, facts in _stated()}


def _stated() -> Iterator[tuple[str, str, Facts]]:
    for facet, table in _PLAIN.items():
        for value, options in table.items():
            yield from ((phrase, facet, {facet: value}) for phrase in options)
    for facet, shapes in _TINTED.items():
        tint = FACETS[facet][1]
        for value, options in shapes.items():
            for colour in ATTRIBUTES[tint] if value != NONE else ("",):
                facts = {facet: value, tint: colour} if colour else {facet: value}
                yield from ((phrase.format(colour), facet, facts) for phrase in options if colour != NONE)


def parse_caption(text: str) -> Facts | None:
    """What a caption states, or None where it is not in the grammar (facets out of order, or fewer than four attributes)."""
    text = text.strip()
    opener = next((o for o in OPENERS if text.startswith(f"{o} ")), None)
    if opener is None:
        return None
    facts: Facts = {}
    order = list(FACETS)
    last = -1
    said = text.removeprefix(f"{opener} ").split(", ")
    for phrase in said:
        facet, stated = _readings().get(phrase, ("", {}))
        if not facet or order.index(facet) <= last:
            return None
        last = order.index(facet)
        facts |= stated
    return facts if LEAST <= len(facts) <= MOST and len(said) <= MOST_FACETS else None


def facts_hold(facts: Facts | None, face: Face | None) -> bool:
    """Whether a text that could be read is true of a face that could be read."""
    return facts is not None and face is not None and all(getattr(face, name) == v for name, v in facts.items())


_OPEN = {
    "skin": "what colour is the skin?",
    "hair": "what is the hair like?",
    "hair_colour": "what colour is the hair?",
    "eyes": "where do the eyes look?",
    "eye_colour": "what colour are the eyes?",
    "mouth": "what is the mouth like?",
    "beard": "what kind of beard is there?",
    "glasses": "which glasses does the person wear?",
    "hat": "which hat does the person wear?",
    "clothing": "what are the clothes like?",
    "clothing_colour": "what colour are the clothes?",
    "background": "what colour is the background?",
}
_WORN = {
    "hair": "is the person bald?",
    "beard": "does the person have a beard?",
    "glasses": "does the person wear glasses?",
    "hat": "does the person wear a hat?",
}
QUESTION_KINDS = (*_OPEN, *(f"{name} there" for name in _WORN), "yes or no")


def draw_question(face: Face, rng: random.Random, kind: str | None = None) -> tuple[str, str]:
    """A question about the face and its answer, of any of `QUESTION_KINDS` or a given one. `yes or no` names a facet of this
    face or of another value, equally often."""
    kind = kind or rng.choice((*QUESTION_KINDS, "yes or no", "yes or no"))
    if kind in _OPEN:
        return _OPEN[kind], getattr(face, kind)
    if kind != "yes or no":
        name = kind.removesuffix(" there")
        return _WORN[name], "yes" if (getattr(face, name) == NONE) == (name == "hair") else "no"
    facet = rng.choice(list(FACETS))
    true = rng.random() < 0.5
    shown = face if true else _other(face, facet, rng)
    return f"does the picture show {phrases(facet, shown)[0]}?", "yes" if true else "no"


def _other(face: Face, facet: str, rng: random.Random) -> Face:
    """The face with one value of a facet changed to another."""
    name = rng.choice(attributes_of(facet, face))
    values = [v for v in ATTRIBUTES[name] if v != getattr(face, name) and (name != "hair_colour" or v != NONE)]
    changed = face.altered(**{name: rng.choice(values)})
    if changed.hair == NONE:
        return changed.altered(hair_colour=NONE)
    if changed.hair_colour == NONE:
        return changed.altered(hair_colour=rng.choice(ATTRIBUTES["hair_colour"][1:]))
    return changed
