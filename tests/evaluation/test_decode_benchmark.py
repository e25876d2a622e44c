"""The benchmark of caches: bounds, pairing, files; the smoke suite through the real recipe."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from unidiff.decoding.cache.base import expected_passes
from unidiff.decoding.cache.config import CacheConfig
from unidiff.evaluation.benchmark import random_weights
from unidiff.evaluation.benchmark.measure import MatmulRates, row_counts
from unidiff.evaluation.benchmark.random_weights import (
    SUITES,
    RandomDecode,
    SuiteOptions,
    cache_named,
    random_model,
    request,
    run_suite,
    spread,
)
from unidiff.evaluation.benchmark.result import Benchmark, TimedDecode, write
from unidiff.tokens import Modality, Vocabulary

RECIPE = Path(__file__).resolve().parents[2] / "inference" / "benchmark.py"
VOCABULARY = Vocabulary.unified(11, 7)


def recipe(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(RECIPE), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_the_smoke_suite_runs_as_a_person_runs_it(tmp_path):
    path = tmp_path / "made" / "smoke.json"
    done = recipe("--suite", "smoke", "--json", path, "--blocks", 2, "--runs", 1, "--only", "dual", "--threads", 1)
    assert done.returncode == 0, done.stderr
    assert "corrected" in done.stdout and "only 2 blocks of each row" in done.stdout
    assert sorted(p.name for p in path.parent.iterdir()) == ["smoke.cells", "smoke.csv", "smoke.json", "smoke.png"]
    data = json.loads(path.read_text())
    assert data["suite"] == "smoke" and data["about"]["blocks"] == 2 and data["about"]["threads"] == 1
    assert [row["policy"] for row in data["rows"]] == ["none", "dual"] * 2
    for row in data["rows"]:
        assert row["fraction_of_bound"] == pytest.approx(row["speedup"] / row["bound_corrected"])
        assert row["seconds"] > 0 and row["nfe"] > 0 and row["quality"] is None
    with path.with_suffix(".csv").open() as file:
        assert [line["policy"] for line in csv.DictReader(file)] == ["none", "dual"] * 2
    with Image.open(path.with_suffix(".png")) as image:
        assert image.format == "PNG" and image.width > 100


def test_an_interrupted_suite_goes_on(tmp_path, monkeypatch):
    original, seen = random_weights.measure_workload, []

    def measure(suite, workload, *rest):
        seen.append(workload)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return original(suite, workload, *rest)

    monkeypatch.setattr(random_weights, "measure_workload", measure)
    options = SuiteOptions(only=("dual",), blocks=1, runs=1, cells=tmp_path / "kept")
    with pytest.raises(KeyboardInterrupt):
        run_suite("smoke", options)
    resumed, workloads = run_suite("smoke", options), SUITES["smoke"].workloads
    assert seen == [workloads[0], workloads[1], workloads[1]]
    again = run_suite("smoke", options)
    assert again.to_dict() == resumed.to_dict() and len(seen) == 3
    assert [m["workload"] for m in again.about["matmul"]] == [w.describe() for w in workloads]
    some = run_suite("smoke", replace(options, shapes=("8+0",)))
    assert [r.to_dict() for r in some.rows] == [r.to_dict() for r in again.rows if r.workload["image"] == 0]
    assert len(seen) == 3  # what was measured is taken, whatever shapes were asked for
    run_suite("smoke", replace(options, seed=1))
    assert len(seen) == 5  # other settings are measured anew


def test_mistakes_are_one_sentence(tmp_path, monkeypatch, capsys):
    with pytest.raises(ValueError, match=r"unknown shape '8\+1'; expected some of 8\+16, 8\+0"):
        run_suite("smoke", SuiteOptions(shapes=("8+1",)))
    with pytest.raises(ValueError, match="unknown policy 'dua'; expected some of adaptive"):
        run_suite("smoke", SuiteOptions(only=("dua",)))
    with pytest.raises(ValueError, match="blocks is 0"):
        run_suite("smoke", SuiteOptions(blocks=0, runs=1))
    with pytest.raises(ValueError, match="threads is 0"):
        run_suite("smoke", SuiteOptions(threads=0))
    with pytest.raises(ValueError, match=r"must end in \.json"):
        write(Benchmark("smoke"), tmp_path / "x.txt")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="'cuda' cannot be used here"):
        run_suite("gpu-8b", SuiteOptions())
    assert list(tmp_path.iterdir()) == []


def test_each_policy_runs_in_turn_and_counts_what_the_bound_foretells(monkeypatch):
    calls = []
    original = random_weights.decode_once

    def watched(model, vocabulary, workload, graphs, policy, schedule, seed):
        out = original(model, vocabulary, workload, graphs, policy, schedule, seed)
        calls.append((type(policy).__name__, schedule, seed, out))
        return out

    monkeypatch.setattr(random_weights, "decode_once", watched)
    result = run_suite("smoke", SuiteOptions(only=("dual", "adaptive"), runs=2))
    names = [name for name, *_ in calls[:9]]
    assert names == ["NoCache", "DualCache", "AdaptiveCache"] * 3  # warm-up, then two paired runs
    assert calls[3][2] == calls[4][2] != calls[6][2]  # the same rows inside a pair
    dual = result.rows[1]
    passes = expected_passes(cache_named("dual").build(), calls[4][1], 2, narrows=True)
    assert dual.stats["key_tokens"] == sum(w.k for p in passes for w in p.layers)
    assert dual.bound == pytest.approx(result.rows[0].stats["flops"] / dual.stats["flops"], rel=0.02)
    assert result.rows[0].bound == result.rows[0].speedup == 1 and 0 < result.rows[0].outside_share < 1
    for measured in result.about["matmul"]:
        for step in measured["steps"].values():
            assert step["share"] == pytest.approx(step["roofline"] / step["seconds"]) and step["seconds"] > 0
        assert measured["steps"]["full"]["roofline"] >= measured["steps"]["cached"]["roofline"] > 0
    assert len(dual.seconds_all) == 2 and dual.bound_reference is not None


def test_blocks_are_spread_over_the_row():
    assert spread(18, None) == frozenset(range(18)) == spread(18, 30)
    assert spread(18, 2) == {4, 13} and spread(4, 1) == {2} and spread(3, 3) == {0, 1, 2}
    workload = RandomDecode(8, (2, 6), 4, 3, "float32")
    schedule = workload.schedule(VOCABULARY, 2)
    assert [(s.tokens, s.given) for s in schedule.segments] == [(4, True), (4, False), (4, True), (4, False), (4, True)]
    batch = request(schedule, workload.grid, VOCABULARY, 2, 0)
    assert batch.shape == (2, 20) and batch.targets[0].nonzero().flatten().tolist() == [4, 5, 6, 7, 12, 13, 14, 15]
    assert (batch.modality[0] == Modality.IMAGE).tolist() == [False] * 8 + [True] * 12
    assert [start for start, *_ in schedule.blocks] == [4, 12]
    whole = workload.schedule(VOCABULARY)
    assert [s.tokens for s in whole.segments] == [8, 12] and len(whole.blocks) == 5


def test_random_models_tell_positions_apart():
    """Ties would make every position as sure as the others, and max-logit would recompute them all."""
    suite = SUITES["smoke"]
    model = random_model(suite, torch.device("cpu"), 0)
    schedule = suite.workloads[0].schedule(suite.vocabulary, 4)
    batch = request(schedule, (4, 4), suite.vocabulary, 1, 0).hide_targets(suite.vocabulary)
    best = model(batch).amax(-1)[batch.targets]
    assert len(best.unique()) == len(best)


def test_rates_are_interpolated():
    rates = MatmulRates(((1, 10.0), (16, 50.0), (64, 70.0)))
    assert [rates(n) for n in (1, 4, 16, 64, 1000)] == [10, pytest.approx(30), 50, 70, 70]
    assert MatmulRates(((4, 5.0),))(1) == 5
    assert row_counts(1152, 64) == [1, 4, 16, 64, 256, 1024, 1152] and row_counts(20, 3) == [1, 3, 4, 16, 20]


def test_all_suites_are_sound():
    for name, suite in SUITES.items():
        assert all(map(cache_named, suite.policies)) and suite.policies[0] == "none", name
        for workload in suite.workloads:
            schedule = workload.schedule(suite.vocabulary)
            assert schedule.targets == schedule.length == workload.text + workload.image
            for policy in suite.policies:
                assert expected_passes(cache_named(policy).build(), workload.schedule(suite.vocabulary, 1), 1)
    twenty_five = [w for w in SUITES["cpu-25m"].workloads if w.grid]
    assert {(w.passes, w.dtype) for w in twenty_five} == {(n, d) for n in (8, 16, 64) for d in ("float32", "bfloat16")}
    blocks = [len(w.schedule(SUITES["cpu-25m"].vocabulary).blocks) for w in twenty_five]
    assert {(w.text + w.image, w.block, n) for w, n in zip(twenty_five, blocks)} == {(1152, 64, 18)}


def test_unknown_numbers_stay_empty():
    workload = {"text": 4, "image": 0, "block": None, "passes": None, "rule": "quota", "dtype": "float32", "batch": 1}
    row = TimedDecode("none", workload, 1, 1.0, [1.0], 1.0)
    assert row.fraction_of_bound is None and row.to_dict()["text"] == 4 and "workload" not in row.to_dict()
    assert cache_named("adaptive-upstream") == CacheConfig("adaptive", {"compat": "upstream"})
