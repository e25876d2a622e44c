"""bf16 steps on a CPU do not accumulate memory."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
from train_fixtures import MIXED, tiny_config, tiny_table

from unidiff.train.trainer import Trainer

pytestmark = pytest.mark.training
STATUS = Path("/proc/self/statm")


def resident_megabytes() -> float:
    return int(STATUS.read_text().split()[1]) * 4096 / 2**20


def growth(tmp_path, warm: int, steps: int, *overrides: str) -> float:
    trainer = Trainer(tiny_config(tmp_path, *MIXED, *overrides), tiny_table(length=8, side=4))
    for _ in range(warm):
        trainer.step(1.0)
    gc.collect()
    before = resident_megabytes()
    for _ in range(steps):
        trainer.step(1.0)
    gc.collect()
    return resident_megabytes() - before


@pytest.mark.skipif(not STATUS.exists(), reason="needs /proc")
def test_memory_is_level_over_sixty_bf16_steps(tmp_path):
    # one leaked [B, L, D] activation set per step would be 60 x 0.8 MB
    assert growth(tmp_path, 20, 60, "precision=bf16", "batch_size=32") < 15


@pytest.mark.slow
@pytest.mark.skipif(not STATUS.exists(), reason="needs /proc")
def test_memory_is_level_over_three_hundred_bf16_steps(tmp_path):
    model = "model={hidden_size: 128, num_layers: 4, num_heads: 4, qk_norm: head}"
    assert growth(tmp_path, 40, 300, "precision=bf16", "batch_size=64", model, "objective.chunk=256") < 60
