"""Hard retrieval: captions of a picture that are wrong in one phrase alone."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import zip_longest

from unidiff.worlds.emoji.language import (
    NUMBERS,
    RELATIONS,
    ZONE_PHRASES,
    Facts,
    counted,
    facts_hold,
    parse_caption,
    sized,
)
from unidiff.worlds.emoji.scenes import BACKGROUNDS, Scene


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
