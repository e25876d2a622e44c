"""The recipes' settings load, and say what they claim."""

from __future__ import annotations

from pathlib import Path

import pytest

from unidiff.train.config import read_config
from unidiff.train.cost.plan import make_plan

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
RUNS = sorted(p for p in CONFIGS.glob("*.yaml") if "tokenizer" not in p.name)
PLANNED = [p for p in RUNS if "vocabulary:" in p.read_text()]


@pytest.mark.parametrize("path", RUNS, ids=lambda p: p.stem)
def test_every_run_loads_and_says_data_hardware_and_loss(path):
    read_config(path)
    comment = path.read_text().split("\noutput:")[0]
    assert comment.startswith("#")
    if path in PLANNED:
        assert all(word in comment for word in ("Data:", "Hardware:", "Expected loss:"))


@pytest.mark.parametrize("path", PLANNED, ids=lambda p: p.stem)
def test_every_planned_run_can_be_planned(path):
    plan = make_plan(read_config(path), gpus=64)
    assert plan.layouts and plan.step_flops > 0 and plan.rows_per_gpu == 8


def test_unidisc_stages_are_the_published_ones():
    stages = [read_config(CONFIGS / f"unidisc-1.4b-stage{n}.yaml") for n in (1, 2, 3)]
    assert [s.objective.image_weight for s in stages] == [0.6, 0.5, 0.2]
    assert [s.data.text_length + s.data.grid**2 for s in stages[:2]] + [stages[2].data.pack] == [384, 1152, 1536]
    assert [s.checkpoint.init_from for s in stages[1:]] == [s.output + "/model" for s in stages[:2]]
    for stage in stages:
        plan = make_plan(stage, gpus=8)
        assert round(plan.size.total / 1e9, 3) == 1.407
        assert {t.loss for t in (stage.tasks.generate, stage.tasks.text_to_image, stage.tasks.caption)} == {"softmin"}
        assert (stage.optimiser.lr, stage.optimiser.beta2, stage.optimiser.clip, stage.batch_size) == (
            1e-4,
            0.999,
            1,
            512,
        )
