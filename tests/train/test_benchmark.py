"""The training benchmark at a tiny size: it reports what happened, it does not judge how fast."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from unidiff.tokens import Vocabulary
from unidiff.train.config import read_config
from unidiff.train.cost.benchmark import (
    TrainingLoad,
    fit_to_memory,
    head_flops_ratio,
    matmul_peak,
    measure_head,
    measure_step,
)
from unidiff.train.cost.plan import declared_vocabulary, model_size, row_flops

pytestmark = pytest.mark.training
ROOT = Path(__file__).resolve().parents[2]


def load(model: str, text_size: int, image_size: int, *settings: str) -> TrainingLoad:
    config = read_config(None, [f"model={model}", "device=cpu", *settings])
    return TrainingLoad(config, Vocabulary.unified(text_size, image_size, {"eos": 0}))


TINY = load(
    "{hidden_size: 32, num_layers: 1, num_heads: 2}", 3000, 2000, "data.text_length=16", "data.grid=4", "batch_size=4",
    "objective.chunk=16",
)  # fmt: skip


def test_a_step_is_split_into_parts_that_add_up():
    report = measure_step(TINY, steps=3)
    assert set(report.parts) == {"data", "forward", "head_and_loss", "backward", "optimiser"}
    assert all(seconds > 0 for seconds in report.parts.values())
    assert sum(report.parts.values()) == pytest.approx(report.seconds)  # shares of one clock
    assert report.tokens_per_second == pytest.approx(4 * 32 / report.seconds)
    size = model_size(TINY.config.model, TINY.vocabulary.size)
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
    big = load(
        "{hidden_size: 16}", 30000, 10000, "data.text_length=128", "data.grid=16", "batch_size=2", "objective.chunk=64"
    )
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
    shown = capsys.readouterr().out
    assert "x less memory" in shown and "cut" not in shown
    shares = [float(line.split()[-2]) for line in shown.splitlines() if line.endswith(" %")]
    assert len(shares) == 5 and sum(shares) == pytest.approx(100, abs=0.3)
    for words, said in {
        ("smoke", "--json", "/dev/full"): "a device", ("smoke", "--json", str(tmp_path)): "is a folder",
        ("smoke", "--json", str(tmp_path / "r.json" / "x.json")): "lies under", ("smoke", "--steps", "0"): "--steps is 0",
        ("smoke", "model.hidden_size=wide"): "hidden_size", ("smoke", "model.width=3"): "width",
        ("smoke", "device=mps"): "mps",
    }.items():  # fmt: skip
        assert recipe.main(list(words)) == 2
        assert said in capsys.readouterr().err
    assert recipe.main(["nothing.yaml"]) == 2 and "does not exist" in capsys.readouterr().err
    assert recipe.main([str(ROOT / "configs" / "own.yaml")]) == 2 and "declares no" in capsys.readouterr().err


GIB = 2**30


def test_what_does_not_fit_is_cut_and_said():
    config = read_config(ROOT / "configs" / "unidisc-small.yaml", [])
    work = TrainingLoad(config, declared_vocabulary(config))
    assert config.batch_size == 512 and fit_to_memory(work, None).notes == ()
    whole = fit_to_memory(work, 10_000 * GIB)
    assert (whole.head, whole.step, whole.notes) == (work, work, ())
    before = 0
    for free in (8, 16, 64, 128):
        fit = fit_to_memory(work, free * GIB)
        assert before < fit.head.config.batch_size < 512 and 1 <= fit.step.config.batch_size <= 512
        assert len(fit.notes) == 2 - (fit.step.config.batch_size == 512) and f"{free:.1f} GiB are free" in fit.notes[0]
        before = fit.head.config.batch_size
    with pytest.raises(ValueError, match=r"one row of the measurement of head and loss needs .* and 0\.1 are free"):
        fit_to_memory(work, GIB // 10)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs the peak memory of /proc")
def test_the_estimate_of_the_dense_head_is_near_what_it_takes():
    work = load(
        "{hidden_size: 32, num_heads: 2}",
        20000,
        10000,
        "data.text_length=64",
        "data.grid=8",
        "batch_size=8",
        "objective.chunk=64",
    )
    measured = measure_head(work, repeats=1).dense_memory_mib * 2**20
    logits = work.config.batch_size * work.row.length * work.vocabulary.size
    assert 8 * logits < measured < 30 * logits
