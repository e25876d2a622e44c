"""The second reader reads true pictures like the oracle, in its own way, and the comparison says where they differ."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from unidiff.evaluation.report import EvaluationReport
from unidiff.worlds.emoji.oracle import Oracle
from unidiff.worlds.emoji.scenes import (
    KINDS,
    LARGE,
    Profile,
    Scene,
    SceneGenerator,
    SceneObject,
    get_profile,
    render_batch,
)
from unidiff.worlds.emoji.second_reader import SecondReader, compare_readers

FEW = get_profile("cpu", num_objects=12)  # fits in a second


@pytest.fixture(scope="module")
def reader() -> SecondReader:
    return SecondReader(FEW, training_scenes=50, hidden=300)


def drawn(n: int, profile: Profile = FEW) -> list[Scene]:
    generator = SceneGenerator(profile, seed=50, split="all")
    return [generator.scene(i, KINDS[i % 4]) for i in range(n)]


def test_true_scenes_are_read(reader: SecondReader) -> None:
    scenes = drawn(80)
    assert np.mean([r.scene == s for r, s in zip(reader.read(render_batch(scenes, FEW)), scenes)]) >= 0.97


def test_worn_pictures_are_read_by_both(reader: SecondReader) -> None:
    scenes = drawn(60)
    worn = torch.nn.functional.avg_pool2d(render_batch(scenes, FEW), 3, 1, 1, count_include_pad=False)
    readings = zip(reader.read(worn), Oracle(FEW).read(worn), scenes, strict=True)
    found = [(item in a.objects, item in b.objects) for a, b, s in readings for item in s.objects]
    assert min(np.mean(found, axis=0)) > 0.9


def test_it_fits_the_same_way_every_time(reader: SecondReader) -> None:
    pictures = render_batch(drawn(4), FEW)
    again = SecondReader(FEW, training_scenes=50, hidden=300).read(pictures)
    assert [r.scene for r in again] == [r.scene for r in reader.read(pictures)]


def test_noise_and_strangers_have_no_scene(reader: SecondReader) -> None:
    noise = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert all(r.scene is None for r in reader.read(noise))
    wide = get_profile("cpu")
    strangers = [Scene((SceneObject(name, 2, 2, LARGE),), "white") for name in wide.names[24:]]
    read = [r.scene is not None for r in reader.read(render_batch(strangers, wide))]
    assert np.mean(read) < 0.2


def test_comparison_counts_where_the_readers_differ(reader: SecondReader) -> None:
    scenes = [Scene((SceneObject(name, 2, 2, LARGE),), "white") for name in FEW.names[:4]]
    pictures = render_batch(scenes, FEW)
    pictures[3] = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(1))
    prompts = ["a dog face", "a cat face on white", "a bear", "a bear"]  # right, right, wrong, unreadable
    report = EvaluationReport()
    compare_readers(prompts, pictures, FEW, report, reader)
    values = {key.removeprefix("readers."): value for key, value in report.values.items()}
    assert values["oracle_right"] == values["second_right"] == 0.5
    assert values["second_true"] >= 0.97
    assert values["same_judgement"] == values["same_scene"] == 1.0
    assert values["contradiction"] == values["only_oracle_reads"] == values["only_second_reads"] == 0.0
