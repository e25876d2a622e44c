"""Evaluation, cache profiles and benchmarks on another device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from device_cases import any_name_means_it, on_both, plainly
from emoji_fakes import vocabulary_words
from PIL import Image
from tiny_pipeline import tiny_pipeline
from virtual_device import DEVICE, virtual_device

from unidiff.evaluation.benchmark.gpu_check import Place
from unidiff.evaluation.benchmark.gpu_checks import CHECKS
from unidiff.evaluation.benchmark.measure import model_hash
from unidiff.evaluation.benchmark.random_weights import SuiteOptions, run_suite
from unidiff.evaluation.benchmark.trained import TrainedOptions, run_trained
from unidiff.evaluation.cache_profile import profile_pipeline
from unidiff.tokens import Vocabulary
from unidiff.train.config import read_config
from unidiff.train.cost.benchmark import TrainingLoad, measure_head, measure_step
from unidiff.worlds.emoji.demo import run_demo
from unidiff.worlds.emoji.evaluation import ALL_TASKS, judged_tasks, oracle_reward, run_emoji_eval
from unidiff.worlds.emoji.scenes import get_profile


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline(text_length=40, grid=(8, 8), corpus=vocabulary_words(get_profile("cpu")) * 2)


@pytest.mark.parametrize(
    "tasks", [("caption", "answer", "likelihood"), pytest.param(ALL_TASKS, marks=pytest.mark.slow)], ids=len
)
def test_emoji_eval_gives_the_same_numbers(pipe, tasks):
    def evaluated(pipe: Any) -> dict[str, Any]:
        few = get_profile("cpu", num_objects=12)
        report = run_emoji_eval(pipe, tasks=tasks, seed=1, n=2, batch_size=2, steps=2, profile=few).to_dict()
        report.pop("seconds")
        return report

    expected, found, _ = on_both(pipe, evaluated)
    same(expected, found)


def same(a: Any, b: Any) -> None:
    """Assert that two trees of plain values are the same but for rounding."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for name in a:
            same(a[name], b[name])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for one, two in zip(a, b, strict=True):
            same(one, two)
    elif isinstance(a, float):
        assert b == pytest.approx(a, rel=1e-3, abs=1e-4, nan_ok=True)
    else:
        assert a == b


def test_the_oracle_rewards_pictures_of_the_device(pipe):
    reward, prompts = oracle_reward(pipe, 3)
    pictures = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with virtual_device():
        assert torch.equal(
            reward([prompts(0), prompts(1)], pictures), reward([prompts(0), prompts(1)], pictures.to(DEVICE))
        )


@pytest.mark.slow
def test_the_demo_is_drawn(pipe, tmp_path):
    small = tiny_pipeline(text_length=40, grid=(2, 2), corpus=vocabulary_words(get_profile("cpu")) * 2)
    count = iter(range(2))
    (first, _), (second, _), _ = on_both(small, lambda p: run_demo(p, tmp_path / str(next(count)), seed=1))
    a, b = (np.asarray(Image.open(path), dtype=np.int16) for path in (first, second))
    assert a.shape == b.shape and np.abs(a - b).max() <= 1


def test_cache_profiles_are_the_same():
    small = tiny_pipeline()
    small.transformer.double()  # correlations of small changes enlarge rounding
    expected, found, _ = on_both(small, lambda p: profile_pipeline(p, ["a dog", "two cats"], steps=3))
    assert expected.keys() == found.keys()
    for task, profile in expected.items():
        same(profile.to_dict(), found[task].to_dict())


def test_the_benchmark_of_caches_runs(tmp_path):
    with virtual_device(), any_name_means_it():
        result = run_suite("smoke", SuiteOptions(only=("dual", "adaptive"), blocks=1, runs=1, cells=tmp_path))
    rows = [row.to_dict() for row in result.rows]
    assert rows and all(row["seconds"] > 0 and row["nfe"] > 0 for row in rows)
    plain = run_suite("smoke", SuiteOptions(only=("dual", "adaptive"), blocks=1, runs=1))
    assert [row["nfe"] for row in rows] == [row.to_dict()["nfe"] for row in plain.rows]


@pytest.mark.slow
def test_the_benchmark_of_a_trained_model_runs(pipe, tmp_path):
    options: dict[str, Any] = dict(caches=("interval",), tasks=("caption",), settings=("model", "passes-2"))
    options |= dict(batches=(1,), cases=2, rows=1, runs=1, quality_batch=2)
    with plainly():
        here = TrainedOptions(cells=tmp_path / "cpu", **options)
        expected = run_trained("emoji", judged_tasks(), pipe, here).to_dict()
    with virtual_device(), any_name_means_it():
        there = TrainedOptions(cells=tmp_path / "there", **options)
        found = run_trained("emoji", judged_tasks(), pipe, there).to_dict()
        assert pipe.transformer.device == DEVICE
        assert model_hash(pipe) == model_hash(pipe.to("cpu"))
    assert [row["quality"] for row in expected["rows"]] == [row["quality"] for row in found["rows"]]
    json.dumps(found)


@pytest.mark.slow
def test_the_benchmark_of_training_runs(monkeypatch):
    monkeypatch.setattr("unidiff.train.cost.benchmark.matmul_peak", lambda *args, **options: 1e9)  # of large matrices
    shapes = ["data.text_length=8", "data.grid=3", "batch_size=2", "objective.chunk=16", "device=cpu"]
    config = read_config(None, ["model={hidden_size: 32, num_layers: 1, num_heads: 2}", *shapes])
    load = TrainingLoad(config, Vocabulary.unified(300, 200, {"eos": 0}), DEVICE.type)
    with virtual_device(), any_name_means_it():
        assert all(seconds > 0 for seconds in measure_step(load, steps=2).parts.values())
        assert measure_head(load, repeats=1).seconds > 0


@pytest.mark.slow
@pytest.mark.parametrize("check", [c for c in CHECKS if not c.cuda and c.name != "packing"], ids=lambda c: c.name)
def test_the_checks_of_a_gpu_run(monkeypatch, check):
    """(Of packing, FlexAttention has no way to run there.)"""
    monkeypatch.setattr("unidiff.train.cost.benchmark.matmul_peak", lambda *args, **options: 1e9)  # of large matrices
    with virtual_device(), any_name_means_it():
        found = check.run(Place(DEVICE, Path(__file__).parents[2], tiny=True))
    assert found.rows and not found.wrong
