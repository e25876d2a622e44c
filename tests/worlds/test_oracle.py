"""The oracle on true pictures, worn ones, and ones it must refuse."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from unidiff.worlds.emoji.oracle import Oracle
from unidiff.worlds.emoji.scenes import (
    BACKGROUNDS,
    KINDS,
    LARGE,
    SMALL,
    Scene,
    SceneGenerator,
    SceneObject,
    get_profile,
    render,
)

CPU = get_profile("cpu")
ORACLE = Oracle(CPU)
FOX = Scene((SceneObject("fox", 2, 3, LARGE),), "blue")


def pictures(scenes: list[Scene], profile=CPU) -> np.ndarray:
    return np.stack([render(scene, profile) for scene in scenes])


def drawn(kind: str, n: int, profile=CPU) -> list[Scene]:
    generator = SceneGenerator(profile, seed=77, split="all")
    return [generator.scene(i, kind) for i in range(n)]


@pytest.mark.parametrize("kind", KINDS)
def test_true_scenes_are_read_exactly(kind: str) -> None:
    scenes = drawn(kind, 60)
    readings = ORACLE.read(pictures(scenes))
    assert sum(r.scene == s for r, s in zip(readings, scenes)) >= 0.995 * len(scenes)
    assert max(d for r in readings for d in r.distances) < 1e-4


def test_the_large_profile_is_read_too() -> None:
    profile = get_profile("gpu")
    scenes = [scene for kind in KINDS for scene in drawn(kind, 6, profile)]
    assert [r.scene for r in Oracle(profile).read(pictures(scenes, profile))] == scenes


def test_every_background_is_read_behind_every_size() -> None:
    scenes = [
        Scene((SceneObject("pear", 1, 2, size),), name) for name in BACKGROUNDS for size in range(SMALL, LARGE + 1)
    ]
    assert [r.scene for r in ORACLE.read(pictures(scenes))] == scenes


def test_blur_and_noise_of_25_db_keep_most_objects() -> None:
    scenes = drawn("group", 40)
    clean = torch.from_numpy(pictures(scenes)).movedim(-1, 1) / 255
    worn = torch.nn.functional.avg_pool2d(clean, 3, 1, 1, count_include_pad=False)
    worn = (worn + 0.01 * torch.randn(worn.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    assert -10 * (worn - clean).square().mean().log10() < 25.5
    found = [item in r.objects for r, s in zip(ORACLE.read(worn), scenes) for item in s.objects]
    assert np.mean(found) > 0.9


def test_both_picture_formats_give_the_same_reading() -> None:
    pixels = pictures([FOX])
    floats = torch.from_numpy(pixels).movedim(-1, 1).float() / 255
    assert ORACLE.read(pixels) == ORACLE.read(floats)


def test_noise_and_empty_pictures_have_no_scene() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), dtype=np.uint8)
    assert all(r.scene is None and r.background is None and r.unreadable for r in ORACLE.read(noise))
    empty = np.full((1, 64, 64, 3), BACKGROUNDS["red"], np.uint8)
    reading = ORACLE.read(empty)[0]
    assert reading.background == "red" and not reading.objects and not reading.unreadable and reading.scene is None


def test_sprites_from_outside_the_profile_are_unreadable() -> None:
    wide = get_profile("gpu", image_size=64)
    scenes = [Scene((SceneObject(name, 2, 2, LARGE),), ground) for name in wide.names[64::4] for ground in BACKGROUNDS]
    readings = ORACLE.read(pictures(scenes, wide))
    assert np.mean([r.scene is not None for r in readings]) < 0.03
    assert np.mean([r.unreadable > 0 for r in readings]) > 0.97


@pytest.mark.parametrize(
    "damage", ["half a sprite", "a stray block", "two halves", "wrong ground in a corner", "off the grid"]
)
def test_damage_is_unreadable(damage: str) -> None:
    picture = render(FOX, CPU)
    ground = np.array(BACKGROUNDS["blue"], np.uint8)
    if damage == "half a sprite":
        picture[:, 40:] = ground
    elif damage == "a stray block":
        picture[:8, :8] = 255
    elif damage == "two halves":
        picture[:, 40:] = render(Scene((SceneObject("frog", 2, 3, LARGE),), "blue"), CPU)[:, 40:]
    elif damage == "wrong ground in a corner":
        picture[48:, :16] = BACKGROUNDS["purple"]
    else:
        picture = np.roll(picture, (4, 4), (0, 1))
    reading = ORACLE.read(picture[None])[0]
    assert reading.background == "blue"
    assert reading.unreadable >= 1 and reading.scene is None


def test_an_untouched_object_is_read_beside_an_unreadable_one() -> None:
    scene = Scene((SceneObject("fox", 2, 0, LARGE), SceneObject("owl", 2, 4, LARGE)), "white")
    picture = render(scene, CPU)
    picture[16:48, 32:] = picture[16:48, 32:][::-1]  # the owl upside down
    reading = ORACLE.read(picture[None])[0]
    assert reading.objects == scene.objects[:1] and reading.unreadable >= 1


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="free_jitter is 3"):
        Oracle(get_profile("cpu", free_jitter=3))
    with pytest.raises(ValueError, match="multiple of 8 px, but they are 4 px"):
        Oracle(get_profile("cpu", image_size=32))
    with pytest.raises(ValueError, match="64 x 64"):
        ORACLE.read(np.zeros((1, 32, 32, 3), np.uint8))
    with pytest.raises(ValueError, match="expected uint8"):
        ORACLE.read(np.zeros((64, 64, 3), np.uint8))
