"""The scene generator: a pure function of its seed, on the grid, with a split that keeps its word."""

from __future__ import annotations

import numpy as np
import pytest

from unidiff.worlds.emoji.scenes import (
    BACKGROUNDS,
    KINDS,
    LARGE,
    MEDIUM,
    UNITS,
    Scene,
    SceneGenerator,
    SceneObject,
    default_atlas,
    get_profile,
    held_out,
    render,
)

CPU = get_profile("cpu")


def boxes(scene: Scene) -> np.ndarray:
    covered = np.zeros((UNITS, UNITS), int)
    for o in scene.objects:
        assert 0 <= o.row <= UNITS - o.size and 0 <= o.col <= UNITS - o.size
        covered[o.row : o.row + o.size, o.col : o.col + o.size] += 1
    return covered


def test_scenes_are_a_function_of_seed_and_index() -> None:
    one, again, other = (SceneGenerator(CPU, seed) for seed in (3, 3, 4))
    forward = [one.scene(i) for i in range(30)]
    assert [again.scene(i) for i in reversed(range(30))] == forward[::-1]
    assert sum(a == other.scene(i) for i, a in enumerate(forward)) <= 2


@pytest.mark.parametrize("kind", KINDS)
def test_sprites_stay_inside_and_apart(kind: str) -> None:
    generator = SceneGenerator(CPU, 0, "all")
    for i in range(100):
        scene = generator.scene(i, kind)
        assert boxes(scene).max() == 1
        assert scene.background in BACKGROUNDS and all(o.name in CPU.names for o in scene.objects)
        n, kinds = len(scene.objects), len(scene.counts)
        assert {
            "single": n == 1,
            "count": kinds == 1 and 2 <= n <= 5,
            "pair": n == kinds == 2,
            "group": n > kinds > 1 or n == 3,
        }[kind]
        assert scene.objects == tuple(sorted(scene.objects, key=lambda o: (o.row, o.col)))


def test_kinds_come_in_their_proportions() -> None:
    generator = SceneGenerator(CPU, 1, "all")
    scenes = [generator.scene(i) for i in range(1000)]
    single = np.mean([len(s.objects) == 1 for s in scenes])
    several = np.mean([len(s.objects) > 1 and len(s.counts) == 1 for s in scenes])
    assert single == pytest.approx(CPU.kinds[0], abs=0.05) and several == pytest.approx(CPU.kinds[1], abs=0.04)


def test_split_holds_out_its_share_of_compositions() -> None:
    whole = SceneGenerator(CPU, 0, "all")
    share = {kind: np.mean([held_out(whole.scene(i, kind)) for i in range(400)]) for kind in KINDS}
    # one composition in a single object, two where it is counted, three in a pair, more in a group; one in ten each
    for kind, expected in (("single", 0.10), ("count", 0.19), ("pair", 0.27)):
        assert share[kind] == pytest.approx(expected, abs=0.06), kind
    assert share["pair"] < share["group"] < 0.6
    train, kept = SceneGenerator(CPU, 0, "train"), SceneGenerator(CPU, 0, "held_out")
    assert not any(held_out(train.scene(i)) for i in range(300))
    assert all(held_out(kept.scene(i)) for i in range(300))


def test_held_out_rules_look_at_names_not_places() -> None:
    pair = next(s for i in range(500) if held_out(s := SceneGenerator(CPU, 2, "held_out").scene(i, "pair")))
    moved = Scene(tuple(SceneObject(o.name, o.col, o.row, o.size) for o in reversed(pair.objects)), pair.background)
    assert held_out(moved)


def test_render_composites_on_the_background() -> None:
    picture = render(Scene((SceneObject("fox", 0, 4, LARGE),), "red"), CPU)
    assert picture.shape == (64, 64, 3) and picture.dtype == np.uint8
    assert (picture[:, :32] == BACKGROUNDS["red"]).all() and (picture[32:] == BACKGROUNDS["red"]).all()
    sprite = default_atlas().scaled(32)[CPU.names.index("fox")]
    opaque = sprite[..., 3] == 1
    expected = sprite[..., :3] * 255
    assert opaque.mean() > 0.3
    assert np.abs(picture[:32, 32:][opaque] - expected[opaque]).max() <= 0.51


def test_jitter_moves_sprites_off_the_grid_and_clips_at_the_edge() -> None:
    profile = get_profile("cpu", free_jitter=3)
    scenes = [SceneGenerator(profile, 0).scene(i) for i in range(50)]
    offsets = {o.offset for s in scenes for o in s.objects}
    assert len(offsets) > 20 and max(abs(x) for offset in offsets for x in offset) == 3
    assert render(Scene((SceneObject("fox", 0, 0, MEDIUM, (-3, -3)),), "red"), profile).shape == (64, 64, 3)


def test_atlas_names_are_unique_and_enough() -> None:
    atlas = default_atlas()
    assert len(set(atlas.names)) == len(atlas.names) >= 150
    assert atlas.pixels.shape[1:] == (64, 64, 4)


def test_bad_settings_are_named() -> None:
    with pytest.raises(ValueError, match="image_size 60"):
        get_profile("cpu", image_size=60)
    with pytest.raises(ValueError, match="num_objects 1 "):
        get_profile("cpu", num_objects=1)
    with pytest.raises(ValueError, match="unknown profile 'tpu'"):
        get_profile("tpu")
    with pytest.raises(ValueError, match="unknown split 'test'"):
        SceneGenerator(CPU, 0, "test")
    with pytest.raises(ValueError, match="unknown kind of scene 'heap'"):
        SceneGenerator(CPU).scene(0, "heap")
