"""The training benchmark at a tiny size: it reports what happened, it does not judge how fast."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from unidiff.train.benchmark import Workload, head_flops_ratio, matmul_peak, measure_head, measure_step
from unidiff.train.config import read_config
from unidiff.train.flops import model_size, row_flops

pytestmark = pytest.mark.training
ROOT = Path(__file__).resolve().parents[2]
TINY = Workload(
    {"hidden_size": 32, "num_layers": 1, "num_heads": 2}, text_size=3000, image_size=2000, text_length=16, grid=4,
    batch_size=4, chunk=16,
)  # fmt: skip


def test_a_step_is_split_into_parts_that_add_up():
    report = measure_step(TINY, read_config(None, ["device=cpu"]), steps=3)
    assert set(report.parts) == {"data", "forward", "head_and_loss", "backward", "optimiser"}
    assert all(seconds > 0 for seconds in report.parts.values())
    assert sum(report.parts.values()) <= 3 * report.seconds  # medians of each part
    assert report.tokens_per_second == pytest.approx(4 * 32 / report.seconds)
    size = model_size(TINY.model, TINY.vocabulary.size)
    assert report.parameters == size.total and report.flops_per_step == 4 * row_flops(size, TINY.row).total
    assert report.mfu == pytest.approx(report.flops_per_step / report.seconds / report.peak_flops) and report.mfu > 0


def test_the_two_heads_are_measured_side_by_side():
    report = measure_head(TINY, repeats=1)
    assert report.seconds > 0 and report.dense_seconds > 0
    assert report.speedup == report.dense_seconds / report.seconds
    half = 0.5 * (16 * 3000 + 16 * 2000)
    assert head_flops_ratio(TINY) == pytest.approx(32 * 5000 / half)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs the peak memory of /proc")
def test_the_streamed_head_needs_far_less_memory():
    big = Workload({"hidden_size": 16}, 30000, 10000, text_length=128, grid=16, batch_size=2, chunk=64)
    report = measure_head(big, repeats=1)
    assert report.dense_memory_mib > 200  # 768 x 40,001 logits, several times
    assert report.memory_ratio > 8


def test_a_peak_is_a_rate():
    assert matmul_peak("cpu", bf16=False, seconds=0.05) > 1e8


def test_the_command_writes_its_numbers(tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("benchmark_recipe", ROOT / "training" / "benchmark.py")
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    assert recipe.main(["smoke", "--steps", "1", "--json", str(tmp_path / "r.json"), "device=cpu"]) == 0
    report = json.loads((tmp_path / "r.json").read_text())
    assert set(report) == {"work", "head", "step"} and report["step"]["mfu"] > 0
    assert "x less memory" in capsys.readouterr().out
    assert recipe.main(["nothing.yaml"]) == 2 and "does not exist" in capsys.readouterr().err
    assert recipe.main([str(ROOT / "configs" / "own.yaml")]) == 2 and "declares no" in capsys.readouterr().err
