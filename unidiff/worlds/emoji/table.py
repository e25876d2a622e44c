"""Emoji scenes as training data: what is said about each, and the cells of their sprites."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from unidiff.worlds.emoji.language import NUMBERS, caption_distribution, draw_question, plural, zone
from unidiff.worlds.emoji.scenes import (
    BACKGROUNDS,
    SIZES,
    Scene,
    SceneGenerator,
    SceneObject,
    get_profile,
    render_batch,
)

NOTICEABLE = 24
"""A cell shows an object if some pixel differs from some background by more than so many of 255 levels."""


@dataclass(frozen=True)
class QuestionMix:
    """How many questions of which kind a scene gets.

    Attributes:
        plain: as `draw_question` has them, which is how EmojiEval asks.
        yes_no: drawn like these until yes or no is the answer: one bit each is a weak signal to learn from.
        lookup: where a named object is, or how many there are: what relations and mixed groups need.
    """

    plain: int = 2
    yes_no: int = 0
    lookup: int = 0

    def __post_init__(self) -> None:
        counts = (self.plain, self.yes_no, self.lookup)
        if min(counts) < 0 or not sum(counts):
            raise ValueError(f"{counts} plain, yes/no and lookup questions; expected none below 0 and one in all")


def scene_texts(
    scenes: SceneGenerator, index: int, scene: Scene, captions: int, questions: QuestionMix
) -> tuple[list[str], list[tuple[str, str]]]:
    """Captions of scene `index` and (question, answer) pairs, independent of each other, fixed by generator and index."""
    rng = scenes.rng(index, "texts")
    options = caption_distribution(scene)
    drawn = rng.choices(list(options), list(options.values()), k=captions)
    asked = [draw_question(scene, scenes.profile, rng) for _ in range(questions.plain + questions.yes_no)]
    for number in range(questions.plain, len(asked)):
        while asked[number][1] not in ("yes", "no"):
            asked[number] = draw_question(scene, scenes.profile, rng)
    return drawn, asked + [_lookup(scene, rng) for _ in range(questions.lookup)]


def _lookup(scene: Scene, rng: random.Random) -> tuple[str, str]:
    item = rng.choice(scene.objects)
    count = scene.counts[item.name]
    if count == 1 and rng.random() < 0.6:
        return f"where is the {item.name}?", zone(item)
    return f"how many {plural(item.name)} are there?", NUMBERS[count]


class EmojiScenes:
    """A `SceneSource` of emoji scenes."""

    def __init__(self, scenes: SceneGenerator, questions: QuestionMix = QuestionMix()) -> None:
        self.scenes, self.questions = scenes, questions

    def pictures(self, start: int, stop: int) -> Tensor:
        return render_batch([self.scenes.scene(number) for number in range(start, stop)], self.scenes.profile)

    def texts(self, number: int, captions: int) -> tuple[list[str], list[tuple[str, str]]]:
        return scene_texts(self.scenes, number, self.scenes.scene(number), captions, self.questions)

    def level(self, number: int) -> int:
        return len(self.scenes.scene(number).objects)


def picture_source(profile_name: str, kinds: tuple[float, ...], seed: int) -> Callable[[int], Tensor]:
    """Training scenes for an image tokenizer: a picture by number, float32 `[3, H, W]` in [0, 1]."""
    profile = get_profile(profile_name, kinds=kinds)
    scenes = SceneGenerator(profile, seed, split="all")
    return lambda index: render_batch([scenes.scene(index)], profile)[0]


def sprite_cells(profile_name: str, factor: int) -> tuple[Tensor, Tensor]:
    """Every cell of every sprite in every size on all backgrounds, float `[cells, backgrounds, 3, factor, factor]` in
    [0, 1], and the cells of the backgrounds alone, `[backgrounds, 3, factor, factor]`.

    Raises:
        ValueError: `factor` does not divide the unit that sprites are placed by, so that cells differ from place to place.
    """
    profile = get_profile(profile_name)
    unit, grounds = profile.unit, torch.tensor(list(BACKGROUNDS.values())) / 255  # [backgrounds, 3]
    if unit % factor:
        raise ValueError(f"sprites of {profile_name!r} are placed by {unit} pixels, which factor {factor} must divide")
    flat = grounds[:, :, None, None].expand(-1, -1, factor, factor).contiguous()
    cells = []
    for name in profile.names:
        for size in SIZES:
            scenes = [Scene((SceneObject(name, 0, 0, size),), ground) for ground in BACKGROUNDS]
            sprite = render_batch(scenes, profile)[..., : size * unit, : size * unit]  # [backgrounds, 3, n f, n f]
            grid = sprite.unfold(2, factor, factor).unfold(3, factor, factor)  # [backgrounds, 3, n, n, f, f]
            own = grid.permute(2, 3, 0, 1, 4, 5).flatten(0, 1)  # [n^2, backgrounds, 3, f, f]
            shown = (own - flat).abs().flatten(1).amax(1) > NOTICEABLE / 255
            cells.append(own[shown])
    return torch.cat(cells), flat
