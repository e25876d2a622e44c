"""A second reader of emoji pictures, built unlike the oracle: it tells how much of a judgement depends on the reader.

It knows no templates. Every box on the grid is described by coarse shape, colour and edge features, the same for all
sprite sizes, and a ridge regression over random features (Rahimi and Recht 2007) says which sprite fills it, or none.
It is fitted in closed form from generated scenes, half of them blurred and noisy, in a few seconds and always alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from unidiff.diffusion.noise import keyed_uniform
from unidiff.evaluation.report import Estimate, EvaluationReport
from unidiff.worlds.emoji.cases import scenes
from unidiff.worlds.emoji.language import facts_correct, parse_caption
from unidiff.worlds.emoji.oracle import READ_UNIT, Oracle, Reading, as_float_images, ground_distance
from unidiff.worlds.emoji.scenes import (
    BACKGROUNDS,
    KINDS,
    SIZES,
    UNITS,
    Profile,
    Scene,
    SceneGenerator,
    SceneObject,
    render_batch,
)

GRID = READ_UNIT  # features per side of a box: one per `size` pixels
CHANNELS = 6
RIDGE = 3.0
ACCEPT = 0.45
"""Regression value of the best sprite, 1 on clean training boxes, below which a box holds none."""
GROUND_DISTANCE = 0.01
"""Squared colour distance up to which a pixel is background."""
STRANGE_SHARE = 0.25
"""Share of foreground pixels from which on a unit outside all sprites is unreadable."""
TRUE_SCENES = 200


class _Boxes(NamedTuple):
    features: list[Tensor]  # [B, R, C, F], of all boxes of each size
    foreground: Tensor  # [B, 8, 8], share per unit
    grounds: list[int]


class SecondReader:
    """Fits itself when made, with `training_scenes` per sprite of the profile and `hidden` random features."""

    def __init__(self, profile: Profile, training_scenes: int = 40, hidden: int = 1200, seed: int = 0) -> None:
        self.profile = profile
        generator = torch.Generator().manual_seed(seed)
        inputs = CHANNELS * GRID * GRID
        self._lift = torch.randn(inputs, hidden, generator=generator) * (2.0 / inputs) ** 0.5
        self._shift = torch.rand(hidden, generator=generator) - 0.5
        self._weights = self._fit(training_scenes * profile.num_objects, seed)

    def read(self, images: np.ndarray | Tensor, chunk: int = 128) -> list[Reading]:
        """Read pictures in the formats of `Oracle.read`; distances are 1 - regression value."""
        pictures = as_float_images(images)
        readings: list[Reading] = []
        for part in pictures.split(chunk):
            boxes = self._describe(part)
            scores = [self._lifted(x) @ self._weights for x in boxes.features]  # [B, R, C, N + 1]
            readings += [self._assemble(b, scores, boxes) for b in range(len(part))]
        return readings

    def _fit(self, n: int, seed: int) -> Tensor:
        """Ridge regression of sprites (and none) on boxes of true scenes; float32 `[features, N + 1]`."""
        source = SceneGenerator(self.profile, seed=(1 << 40) + seed, split="all")
        width, classes = sum(self._lift.shape) + 1, self.profile.num_objects + 1
        gram, cross = torch.zeros(width, width), torch.zeros(width, classes)
        for start in range(0, n, 256):
            drawn = [source.scene(start + i) for i in range(min(256, n - start))]
            boxes = self._describe(_worn(render_batch(drawn, self.profile), start, seed))
            for x, y in self._labelled(drawn, boxes, start, seed):
                lifted = self._lifted(x)
                gram += lifted.T @ lifted
                cross.index_add_(1, y, lifted.T)
        gram.diagonal().add_(RIDGE)
        return torch.linalg.solve(gram.double(), cross.double()).float()

    def _labelled(
        self, drawn: Sequence[Scene], boxes: _Boxes, start: int, seed: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Features and classes: every box with a sprite, and a few others (shifted, cut, empty) of each picture."""
        none, placed = self.profile.num_objects, [(b, o) for b, scene in enumerate(drawn) for o in scene.objects]
        for number, (size, features) in enumerate(zip(SIZES, boxes.features, strict=True)):
            places = UNITS - size + 1
            labels = torch.full(features.shape[:3], none)
            for b, o in placed:
                if o.size == size:
                    labels[b, o.row, o.col] = self.profile.names.index(o.name)
            keys = torch.arange(start, start + len(drawn))
            u = keyed_uniform(seed, keys, 10 + number, places * places).view(labels.shape)
            keep = (labels != none) | (u < 4 / places**2)
            yield features[keep], labels[keep]

    def _lifted(self, x: Tensor) -> Tensor:
        """Features, random rectified mixtures of them, and one: `[..., F]` -> `[..., hidden + F + 1]`."""
        mixed = F.relu(x @ self._lift + self._shift)
        return torch.cat([mixed, x, torch.ones_like(x[..., :1])], -1)

    def _describe(self, pictures: Tensor) -> _Boxes:
        small = F.avg_pool2d(pictures, self.profile.unit // READ_UNIT)  # [B, 3, 64, 64]
        ground = ground_distance(small) < GROUND_DISTANCE  # [B, 8, 64, 64]
        index = ground.sum((-1, -2)).argmax(1)  # [B], the commonest colour
        seen = (~ground[torch.arange(len(small)), index]).float()[:, None]  # [B, 1, 64, 64]
        grey = small.mean(1, keepdim=True)
        down = F.pad((grey[:, :, 1:] - grey[:, :, :-1]).abs(), (0, 0, 0, 1))
        across = F.pad((grey[..., 1:] - grey[..., :-1]).abs(), (0, 1))
        maps = torch.cat([seen, small * seen, 2 * down, 2 * across], 1)  # [B, 6, 64, 64]
        features = []
        for size in SIZES:
            places = torch.arange(UNITS - size + 1)
            pixels = (places[:, None] * READ_UNIT + torch.arange(GRID) * size).flatten()  # [R GRID]
            coarse = F.avg_pool2d(maps, size, 1)[:, :, pixels[:, None], pixels]  # [B, 6, R GRID, R GRID]
            coarse = coarse.unflatten(3, (len(places), GRID)).unflatten(2, (len(places), GRID))
            features.append(coarse.permute(0, 2, 4, 1, 3, 5).flatten(3) - 0.2)  # [B, R, R, 6 GRID GRID]
        return _Boxes(features, F.avg_pool2d(seen, READ_UNIT)[:, 0], index.tolist())

    def _assemble(self, b: int, scores: list[Tensor], boxes: _Boxes) -> Reading:
        found = []
        for size, score in zip(SIZES, scores, strict=True):
            value, best = score[b].max(-1)  # [R, C]
            for row, col in ((value > ACCEPT) & (best < self.profile.num_objects)).nonzero().tolist():
                name = self.profile.names[int(best[row, col])]
                found.append((float(value[row, col]), SceneObject(name, row, col, size)))
        chosen: list[tuple[SceneObject, float]] = []
        for confidence, item in sorted(found, key=lambda f: -f[0]):
            if not any(item.overlaps(other) for other, _ in chosen):
                chosen.append((item, max(0.0, 1.0 - confidence)))
        return Reading.of(list(BACKGROUNDS)[boxes.grounds[b]], chosen, boxes.foreground[b].numpy() > STRANGE_SHARE)


def _worn(pictures: Tensor, start: int, seed: int) -> Tensor:
    """Every other picture blurred and noisy, as an image tokenizer leaves it."""
    factor = pictures.shape[-1] // 64
    blurred = F.avg_pool2d(pictures, 2 * factor + 1, 1, factor, count_include_pad=False)
    generator = torch.Generator().manual_seed((seed << 32) + start)
    noise = torch.rand(pictures.shape, generator=generator) - 0.5
    worn = (0.5 * blurred + 0.5 * pictures + 0.1 * noise).clamp(0, 1)
    return torch.where((torch.arange(len(pictures)) % 2 == 1)[:, None, None, None], worn, pictures)


def compare_readers(
    prompts: Sequence[str],
    pictures: Tensor,
    profile: Profile,
    report: EvaluationReport,
    second: SecondReader | None = None,
) -> None:
    """Judge drawn pictures with both readers, all facts of their prompts asked for, and note where they differ.

    `second_true` is the share of true scenes that the second reader (a new one by default) reads exactly.
    """
    second = second or SecondReader(profile)
    truth = scenes("second reader", KINDS, TRUE_SCENES, 0, profile, "all")
    known = [r.scene == s for r, s in zip(second.read(render_batch(truth, profile)), truth, strict=True)]
    report.add("readers.second_true", Estimate.share(known))
    facts = [parse_caption(prompt, profile.names) for prompt in prompts]
    mine = [r.scene for r in Oracle(profile).read(pictures)]
    theirs = [r.scene for r in second.read(pictures)]
    pairs = list(zip(mine, theirs, strict=True))
    right = [facts_correct(f, s) for f, s in zip(facts, mine, strict=True)]
    also = [facts_correct(f, s) for f, s in zip(facts, theirs, strict=True)]
    shares = {
        "oracle_right": right,
        "second_right": also,
        "same_judgement": [a == b for a, b in zip(right, also, strict=True)],
        "same_scene": [a == b for a, b in pairs],
        "contradiction": [a is not None and b is not None and a != b for a, b in pairs],
        "only_oracle_reads": [a is not None and b is None for a, b in pairs],
        "only_second_reads": [a is None and b is not None for a, b in pairs],
    }
    for key, values in shares.items():
        report.add(f"readers.{key}", Estimate.share(values))
