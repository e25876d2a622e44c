"""Captions read back: a sentence of the grammar to the facts it states, and whether a scene bears them out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from unidiff.worlds.emoji import language as grammar
from unidiff.worlds.emoji.atlas import default_atlas
from unidiff.worlds.emoji.scenes import BACKGROUNDS, LARGE, Scene


@dataclass(frozen=True)
class Facts:
    """What a caption states. Parts it leaves out are None.

    Attributes:
        counts: (name, number) pairs in the order they are named.
        size: `large` or `small`, zone: one of nine places, both of a single object.
        relation: (first, where it is, second). background: its colour.
    """

    counts: tuple[tuple[str, int], ...]
    size: str | None = None
    zone: str | None = None
    relation: tuple[str, str, str] | None = None
    background: str | None = None

    @property
    def total(self) -> int:
        """Objects named, by number."""
        return sum(n for _, n in self.counts)


def parse_caption(text: str, names: tuple[str, ...] | None = None) -> Facts | None:
    """Read a caption of the grammar in `language`.

    Args:
        text: one caption, exactly as the grammar writes it; surrounding white space is ignored.
        names: sprite names that may occur; the whole atlas by default.

    Returns:
        Its facts, or None if the sentence is not in the grammar.
    """
    text = text.strip()
    opener = max((o for o in grammar.OPENERS if text.startswith(o)), key=len)
    core, background = text.removeprefix(opener), None
    for colour in BACKGROUNDS:  # `a fox on red` -> `a fox`, `red`
        for phrase in grammar.GROUND_PHRASES:
            if background is None and core.endswith(ending := " " + phrase.format(colour)):
                core, background = core.removesuffix(ending), colour
    phrases = _phrases(tuple(names) if names is not None else default_atlas().names)
    facts = _single(core, phrases) or _related(core, phrases) or _listed(core, phrases)
    return None if facts is None else replace(facts, background=background)


def facts_hold(facts: Facts, scene: Scene) -> bool:
    """Whether everything stated is true of the scene: a number means exactly so many."""
    counts = scene.counts
    if any(counts.get(name, 0) != n for name, n in facts.counts):
        return False
    if facts.background is not None and facts.background != scene.background:
        return False
    named = [o for o in scene.objects if o.name == facts.counts[0][0]]
    if facts.size is not None and any((o.size == LARGE) != (facts.size == "large") for o in named):
        return False
    if facts.zone is not None and any(grammar.zone(o) != facts.zone for o in named):
        return False
    if facts.relation is not None:
        first, where, second = facts.relation
        pairs = [(a, b) for a in scene.objects for b in scene.objects if a.name == first and b.name == second]
        return bool(pairs) and all(grammar.relation(a, b) == where for a, b in pairs)
    return True


def facts_complete(facts: Facts, scene: Scene) -> bool:
    """Whether no object of the scene is left out, by name and number; size, place and background may be."""
    return dict(facts.counts) == scene.counts


def facts_correct(facts: Facts | None, scene: Scene | None) -> bool:
    """Facts that could be read, from a scene that could be read, and that hold and leave no object out."""
    return facts is not None and scene is not None and facts_hold(facts, scene) and facts_complete(facts, scene)


class _Phrases(NamedTuple):
    single: dict[str, str]  # "a dog face" -> name
    sized: dict[str, tuple[str, str]]  # "a small dog face" -> (name, size)
    counted: dict[str, tuple[str, int]]  # "a dog face", "three dog faces" -> (name, number)


@lru_cache(maxsize=8)
def _phrases(names: tuple[str, ...]) -> _Phrases:
    return _Phrases(
        {grammar.article(name): name for name in names},
        {grammar.sized(name, f"{size} "): (name, size) for name in names for size in ("large", "small")},
        {grammar.counted(name, n): (name, n) for name in names for n in grammar.NUMBERS},
    )


def _single(core: str, phrases: _Phrases) -> Facts | None:
    place, head = None, core
    for name, options in grammar.ZONE_PHRASES.items():
        for option in options:
            if core.endswith(" " + option):
                place, head = name, core.removesuffix(" " + option)
    if head in phrases.single:
        return Facts(((phrases.single[head], 1),), zone=place)
    if head in phrases.sized:
        name, size = phrases.sized[head]
        return Facts(((name, 1),), size, place)
    return None


def _related(core: str, phrases: _Phrases) -> Facts | None:
    for where, options in grammar.RELATIONS.items():
        for option in options:
            first, found, second = core.partition(f" {option} ")
            if found and first in phrases.single and second in phrases.single:
                a, b = phrases.single[first], phrases.single[second]
                return Facts(((a, 1), (b, 1)), relation=(a, where, b)) if a != b else None
    return None


def _listed(core: str, phrases: _Phrases) -> Facts | None:
    """One counted phrase, or several joined by commas and a last `and`."""
    head, found, last = core.rpartition(" and ")
    parts = [*head.split(", "), last] if found else [last]
    if any(part not in phrases.counted for part in parts):
        return None
    counts = tuple(phrases.counted[part] for part in parts)
    return Facts(counts) if len(dict(counts)) == len(counts) else None
