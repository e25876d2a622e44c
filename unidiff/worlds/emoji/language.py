"""What is said about emoji scenes: captions with their exact distribution, and balanced questions with answers.

The caption distribution depends on the scene alone, and a scene can be read back from its picture, so the entropy
H(caption | picture) is exactly the entropy of the enumerated caption distribution.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import permutations, product
from typing import NamedTuple

from unidiff.worlds.emoji.scenes import BACKGROUNDS, LARGE, UNITS, Profile, Scene, SceneObject, default_atlas

NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four", 5: "five"}
# Names that are plural or a mass already: no article, and the same word for any number.
UNCOUNTED = {
    "cherries", "grapes", "bread", "bacon", "broccoli", "garlic", "peanuts", "pancakes", "french fries", "popcorn",
    "sushi", "chocolate", "tennis", "american football", "bowling", "ping pong", "books", "soap", "glasses", "fire",
    "high voltage",
}  # fmt: skip
IRREGULAR = {
    "butterfly": "butterflies", "candy": "candies", "strawberry": "strawberries", "trophy": "trophies", "deer": "deer",
    "tropical fish": "tropical fish", "wolf": "wolves", "maple leaf": "maple leaves", "cactus": "cacti", "die": "dice",
    "game die": "game dice", "potato": "potatoes", "tomato": "tomatoes", "mango": "mangoes", "volcano": "volcanoes",
    "teacup without handle": "teacups without handle",
    "globe showing Europe-Africa": "globes showing Europe-Africa",
}  # fmt: skip
ZONES = {
    (0, 0): "top left", (0, 1): "top", (0, 2): "top right",
    (1, 0): "left", (1, 1): "centre", (1, 2): "right",
    (2, 0): "bottom left", (2, 1): "bottom", (2, 2): "bottom right",
}  # fmt: skip
ZONE_PHRASES = {
    "top left": ("in the top left corner", "at the top left"),
    "top right": ("in the top right corner", "at the top right"),
    "bottom left": ("in the bottom left corner", "at the bottom left"),
    "bottom right": ("in the bottom right corner", "at the bottom right"),
    "top": ("at the top", "near the top"),
    "bottom": ("at the bottom", "near the bottom"),
    "left": ("on the left", "on the left side"),
    "right": ("on the right", "on the right side"),
    "centre": ("in the centre", "in the middle"),
}
RELATIONS = {
    "left of": ("to the left of", "left of"),
    "right of": ("to the right of", "right of"),
    "above": ("above", "on top of"),
    "below": ("below", "under"),
}
OPENERS = ("", "a picture of ", "an image of ")
GROUND_PHRASES = ("on a {} background", "on {}", "against a {} background", "with a {} background")
_NO_GROUND = 0.1  # share of captions that leave the background out


def article(name: str) -> str:
    """`a dog face`, `an owl`, `cherries`."""
    if name in UNCOUNTED:
        return name
    vowel = name[0] in "aeiou" and name not in {"unicorn", "ewe"}
    return f"{'an' if vowel else 'a'} {name}"


def sized(name: str, size: str) -> str:
    """`a small dog face`, `large cherries`; the size is `large ` or `small `."""
    return size + name if name in UNCOUNTED else f"a {size}{name}"


def plural(name: str) -> str:
    """`dog faces`, `ears of corn`, `cherries`."""
    if name in UNCOUNTED:
        return name
    head, of, rest = name.partition(" of ")
    regular = head + ("es" if head.endswith(("s", "x", "ch", "sh")) else "s")
    return IRREGULAR.get(head, regular) + of + rest


def counted(name: str, n: int) -> str:
    """`a dog face` for one, `three dog faces` for more."""
    return article(name) if n == 1 else f"{NUMBERS[n]} {plural(name)}"


def zone(item: SceneObject) -> str:
    """Which of nine places a sprite is at: flush with an edge, or between."""
    last = UNITS - item.size
    place = [0 if at <= 0 else 2 if at >= last else 1 for at in (item.row, item.col)]
    return ZONES[place[0], place[1]]


def relation(first: SceneObject, second: SceneObject) -> str:
    """Where `first` is as seen from `second`, along the axis on which they differ more."""
    down, right = first.row - second.row, first.col - second.col
    if abs(right) >= abs(down):
        return "left of" if right < 0 else "right of"
    return "above" if down < 0 else "below"


def caption_distribution(scene: Scene) -> dict[str, float]:
    """Every caption the grammar may give for a scene, with its probability; they sum to one."""
    result: dict[str, float] = defaultdict(float)
    share = (1.0 - _NO_GROUND) / len(GROUND_PHRASES)
    grounds = {"": _NO_GROUND} | {f" {phrase.format(scene.background)}": share for phrase in GROUND_PHRASES}
    for (core, p_core), opener, (ground, p_ground) in product(_cores(scene).items(), OPENERS, grounds.items()):
        result[opener + core + ground] += p_core * p_ground / len(OPENERS)
    return dict(result)


def caption_entropy(scene: Scene) -> float:
    """H(caption | scene) in nats, exactly."""
    return -sum(p * math.log(p) for p in caption_distribution(scene).values())


def draw_caption(scene: Scene, rng: random.Random) -> str:
    """One caption from `caption_distribution`."""
    options = caption_distribution(scene)
    return rng.choices(list(options), list(options.values()))[0]


def _cores(scene: Scene) -> dict[str, float]:
    objects, counts = scene.objects, scene.counts
    if len(objects) == 1:
        return _single_cores(objects[0])
    cores: dict[str, float] = defaultdict(float)
    if len(objects) == len(counts) == 2:
        for first, second in permutations(objects, 2):
            for phrase in RELATIONS[relation(first, second)]:
                cores[f"{article(first.name)} {phrase} {article(second.name)}"] += 0.8 / 4
            cores[f"{article(first.name)} and {article(second.name)}"] += 0.1
        return cores
    orders = list(permutations(counts.items()))
    for order in orders:
        *most, last = [counted(name, n) for name, n in order]
        cores[" and ".join([", ".join(most), last] if most else [last])] += 1.0 / len(orders)
    return cores


def _single_cores(item: SceneObject) -> dict[str, float]:
    sizes = {"": 0.8, "large ": 0.2} if item.size == LARGE else {"": 0.4, "small ": 0.6}
    places = {"": 0.4, **{" " + phrase: 0.6 / 2 for phrase in ZONE_PHRASES[zone(item)]}}
    names = {size: sized(item.name, size) if size else article(item.name) for size in sizes}
    return {names[size] + place: sizes[size] * places[place] for size in sizes for place in places}


def draw_question(scene: Scene, profile: Profile, rng: random.Random) -> tuple[str, str]:
    """A question about the scene and its answer. Yes and no are equally likely, and so are the numbers one to five
    at the default mix of scenes."""
    kinds = {"colour": 1.0, "exists": 1.5}
    if len(scene.objects) == 1:
        kinds |= {"what": 1.0, "where": 1.0, "number": 0.4}
    elif len(scene.counts) == 1:
        kinds |= {"what": 1.0, "number": 3.0}
    elif len(scene.objects) == 2:
        kinds |= {"what side": 2.0, "related": 1.5}
    kind = rng.choices(list(kinds), list(kinds.values()))[0]
    first = rng.choice(scene.objects)
    if kind == "colour":
        return "what colour is the background?", scene.background
    if kind == "what":
        return "what is in the picture?", first.name
    if kind == "where":
        return f"where is the {first.name}?", zone(first)
    if kind == "number":
        return f"how many {plural(first.name)} are there?", NUMBERS[scene.counts[first.name]]
    if kind == "exists":
        present = rng.random() < 0.5
        absent = [n for n in profile.names if n not in scene.counts]
        name = first.name if present else rng.choice(absent)
        return f"is there {article(name)}?", "yes" if present else "no"
    other = next(o for o in scene.objects if o is not first)
    side = relation(first, other)
    if kind == "related":
        true = rng.random() < 0.5
        claimed = side if true else rng.choice([r for r in RELATIONS if r != side])
        question = f"is the {first.name} {RELATIONS[claimed][0]} the {other.name}?"
        return question, "yes" if true else "no"
    place = {"left of": "left", "right of": "right", "above": "top", "below": "bottom"}[side]
    return f"what is {ZONE_PHRASES[place][0]}?", first.name


@dataclass(frozen=True)
class Facts:
    """What a caption states; parts it leaves out are None.

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
    """The facts of a caption, or None if it is not in the grammar.

    Args:
        text: exactly as the grammar writes it, white space around it aside.
        names: sprite names that may occur; the whole atlas by default.
    """
    text = text.strip()
    opener = max((o for o in OPENERS if text.startswith(o)), key=len)
    core, background = text.removeprefix(opener), None
    for colour in BACKGROUNDS:  # `a fox on red` -> `a fox`, `red`
        for phrase in GROUND_PHRASES:
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
    if facts.zone is not None and any(zone(o) != facts.zone for o in named):
        return False
    if facts.relation is not None:
        first, where, second = facts.relation
        pairs = [(a, b) for a in scene.objects for b in scene.objects if a.name == first and b.name == second]
        return bool(pairs) and all(relation(a, b) == where for a, b in pairs)
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
        {article(name): name for name in names},
        {sized(name, f"{size} "): (name, size) for name in names for size in ("large", "small")},
        {counted(name, n): (name, n) for name in names for n in NUMBERS},
    )


def _single(core: str, phrases: _Phrases) -> Facts | None:
    place, head = None, core
    for name, options in ZONE_PHRASES.items():
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
    for where, options in RELATIONS.items():
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
