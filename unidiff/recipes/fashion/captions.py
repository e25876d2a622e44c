"""What is said about a photograph, in several ways, and what a sentence says."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from unidiff.recipes.fashion.attributes import ATTRIBUTES
from unidiff.recipes.fashion.photographs import CLASSES

NOUNS: tuple[tuple[str, ...], ...] = (
    ("t-shirt", "tee"),
    ("pair of trousers", "pair of pants"),
    ("pullover", "sweater"),
    ("dress", "gown"),
    ("coat", "jacket"),
    ("sandal", "open shoe"),
    ("shirt", "blouse"),
    ("sneaker", "trainer"),
    ("bag", "handbag"),
    ("ankle boot", "bootie"),
)
"""Of each class, the usual one first."""
ADJECTIVES: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("dark",), ("light", "pale")),
    (("narrow", "slim"), ("wide", "broad")),
    (("plain", "simple"), ("patterned", "textured")),
)
"""Of each attribute, for its lower and its upper third."""
_MENTIONED = 0.6  # of what could be said
_USUAL = 0.7  # of the nouns and adjectives are the usual ones
assert len(NOUNS) == len(CLASSES) and len(ADJECTIVES) == len(ATTRIBUTES)


@dataclass(frozen=True)
class Statement:
    """What a sentence says: a class, and -1 or 1 for each attribute that it has a word about, else 0."""

    label: int
    levels: tuple[int, ...]


def caption(label: int, levels: Sequence[int], rng: random.Random) -> str:
    """One of many true sentences about a photograph, as `Thresholds.levels` sees it."""
    said = [ADJECTIVES[place][level > 0] for place, level in enumerate(levels) if level]
    words = [_one_of(names, rng) for names in said if rng.random() < _MENTIONED]
    rng.shuffle(words)
    noun = _one_of(NOUNS[label], rng)
    form = rng.randrange(4 if words else 2)
    if form == 2:
        return f"{_article(noun)}, {_listed(words)}"
    if form == 3:
        return f"{_article(noun)} that is {_listed(words)}"
    thing = _article(" ".join([*words, noun]))
    return f"a photo of {thing}" if form else thing


def understood(text: str) -> Statement | None:
    """What a sentence says, or None: no class or two, or words that contradict each other."""
    text = text.lower()
    labels = [label for label, nouns in enumerate(NOUNS) if _has(text, nouns)]
    levels = [(_has(text, high), _has(text, low)) for low, high in ADJECTIVES]
    if len(labels) != 1 or any(high and low for high, low in levels):
        return None
    return Statement(labels[0], tuple(high - low for high, low in levels))


def _has(text: str, words: Sequence[str]) -> bool:
    return any(re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", text) for word in words)


def _one_of(words: Sequence[str], rng: random.Random) -> str:
    return words[0] if rng.random() < _USUAL else rng.choice(words)


def _article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
