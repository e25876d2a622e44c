"""What is said about emoji scenes: captions with their exact distribution, and balanced questions with answers.

The caption distribution depends on the scene alone, and a scene can be read back from its picture, so the entropy
H(caption | picture) is exactly the entropy of the enumerated caption distribution.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from itertools import permutations, product

from unidiff.worlds.emoji.scenes import LARGE, UNITS, Profile, Scene, SceneObject

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
