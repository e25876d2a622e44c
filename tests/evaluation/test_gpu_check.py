"""Checks of a GPU: end to end with tiny shapes, and what becomes of those that fail, hang, die or cannot be made."""

from __future__ import annotations

import json
import multiprocessing
import os
import runpy
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from unidiff.decoding import draw
from unidiff.evaluation.benchmark import gpu_check
from unidiff.evaluation.benchmark.gpu_check import DeviceCheck, Found, NotRun, Outcome, Place, page, run_checks, summary
from unidiff.evaluation.benchmark.gpu_checks import (
    CHECKS,
    TRAINED,
    fused_draw,
    gpu_tests,
    graphs,
    packing,
    rates,
    steps,
)
from unidiff.evaluation.benchmark.measure import thread_count
from unidiff.kernels.fused_draw import FusedDraw
from unidiff.train.config import read_config

ROOT = Path(__file__).resolve().parents[2]
CPU = Place(torch.device("cpu"), ROOT, tiny=True)
NO_CUDA = "No CUDA device is here"
quiet = lambda line: None  # noqa: E731


@pytest.fixture
def forked(monkeypatch):
    """Workers begin at once: what is imported need not be imported again."""
    monkeypatch.setattr(gpu_check, "get_context", lambda kind: multiprocessing.get_context("fork"))
    with thread_count(1):
        yield


def wrong(place: Place) -> Found:
    return Found([{"tokens": 3}], "2 tokens differ.")


def raising(place: Place) -> Found:
    raise ValueError("the model is too large; use a smaller one")


def hanging(place: Place) -> Found:
    assert place.seconds <= 1
    time.sleep(60)
    return Found([])


def dying(place: Place) -> Found:
    os._exit(3)


def absent(place: Place) -> Found:
    raise NotRun("triton is missing.")


def counted(folder: Path, place: Place) -> Found:
    """A line in a file for each time."""
    with (folder / "made").open("a") as file:
        file.write("x")
    return Found([{"what": "<b>", "number": 1 / 3}])


def test_all_go_on_after_one_that_fails(forked, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "LEAST", 0.0)
    good = partial(counted, tmp_path)
    makes = {"first": good, "wrong": wrong, "raising": raising, "hanging": hanging, "dying": dying, "absent": absent}
    checks = [DeviceCheck(name, f"About {name}.", 1 if name == "hanging" else 60, run) for name, run in makes.items()]
    checks += [DeviceCheck("cuda", "A kernel.", 1, good, "it is of CUDA"), DeviceCheck("last", "Goes on.", 20, good)]
    small = Place(torch.device("cpu"), tmp_path)
    outcomes = run_checks(checks, small, tmp_path / "out", quiet)
    assert {o.name: (o.status, o.reason) for o in outcomes} == {
        "first": ("passed", ""),
        "wrong": ("failed", "2 tokens differ."),
        "raising": ("failed", "the model is too large; use a smaller one"),
        "hanging": ("failed", "It took more than 1 s and was ended."),
        "dying": ("failed", "Its process ended by itself."),
        "absent": ("not run", "triton is missing."),
        "cuda": ("not run", f"{NO_CUDA}: it is of CUDA."),
        "last": ("passed", ""),
    }
    assert list(outcomes[1].rows) == [{"tokens": 3}]  # what was measured is told, right or wrong
    said = summary(outcomes)
    assert said == "2 of 8 checks passed; failed: wrong, raising, hanging, dying; not run: absent, cuda"
    data = json.loads((tmp_path / "out" / "gpu-check.json").read_text())
    assert [c["status"] for c in data["checks"]] == [o.status for o in outcomes]
    text = (tmp_path / "out" / "gpu-check.html").read_text()
    assert "nothing on this page was run on a GPU" in text and "2 tokens differ." in text
    assert "&lt;b&gt;" in text and "<td>0.3333</td>" in text

    again = run_checks([checks[0], checks[-1]], small, tmp_path / "out", quiet)  # what passed is not made again
    assert [o.seconds for o in again] == [outcomes[0].seconds, outcomes[-1].seconds]
    assert (tmp_path / "made").read_text() == "xx"
    (tmp_path / "unidiff").mkdir()
    (tmp_path / "unidiff" / "changed.py").touch()
    run_checks(checks[-1:], small, tmp_path / "out", quiet)
    assert (tmp_path / "made").read_text() == "xxx"


def test_an_interrupted_run_goes_on(forked, tmp_path):
    checks = [DeviceCheck(name, "Counts.", 20, partial(counted, tmp_path)) for name in ("one", "two")]

    def say(line: str) -> None:
        if line.startswith("two"):
            raise KeyboardInterrupt

    small = replace(CPU, root=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run_checks(checks, small, tmp_path / "out", say)
    data = json.loads((tmp_path / "out" / "gpu-check.json").read_text())
    assert [(c["status"], c["reason"]) for c in data["checks"]] == [("passed", ""), ("not run", "It was not reached.")]
    assert [o.status for o in run_checks(checks, small, tmp_path / "out", quiet)] == ["passed"] * 2
    assert (tmp_path / "made").read_text() == "xx"


def test_when_the_time_is_used_up_the_rest_waits(forked, tmp_path):
    check = DeviceCheck("late", "Counts.", 20, partial(counted, tmp_path))
    (outcome,) = run_checks([check], replace(CPU, root=tmp_path), tmp_path / "out", quiet, limit=1.0)
    assert outcome.status == "not run" and "run the command again" in outcome.reason
    assert not (tmp_path / "made").exists()


def test_mistakes_are_found_before_any_work(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file"):
        run_checks(CHECKS, CPU, tmp_path / "file", quiet)


def test_what_needs_no_gpu_is_made_on_the_cpu():
    """Whole, in tiny shapes. (Training and the embedded model: in the slow test, by the command.)"""
    with thread_count(1):
        for check in (rates, partial(steps, "gpu-8b"), packing):
            found = check(CPU)
            assert found.rows and not found.wrong
            assert all(value > 0 for row in found.rows for value in row.values() if isinstance(value, float))
    shares = steps("gpu-1.4b", CPU).rows
    assert [(row["rows"], row["pass"]) for row in shares] == [(1, "full"), (1, "cached"), (8, "full"), (8, "cached")]


def test_the_fused_draw_is_held_against_torch(monkeypatch):
    with pytest.raises(NotRun, match="triton"):
        fused_draw(CPU)

    def kernel(values, u, temperature, top_k, confidence, *_):
        """The torch path in the place of the kernel."""
        settings = draw.ModalityDecoding(temperature=temperature, top_k=top_k, confidence=confidence)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(draw, "fuses", lambda *_: False)
            found = draw.choose(values, torch.ones_like(u, dtype=torch.bool), settings, u, u)
        return FusedDraw(found.token + shift, found.probability, found.confidence, torch.ones_like(u, dtype=torch.bool))

    monkeypatch.setattr(draw, "fuses", lambda *_: True)
    monkeypatch.setattr(draw, "fused_draw", kernel)
    shift = 0
    found = fused_draw(CPU)
    assert not found.wrong and len(found.rows) == 8 and {row["same tokens %"] for row in found.rows} == {100.0}
    shift = 1
    assert fused_draw(CPU).wrong.startswith("Kernel and torch draw different tokens: best, plain")


def test_graphs_are_held_against_passes_without():
    found = graphs(CPU)
    assert not found.wrong and [row["cache"] for row in found.rows] == ["none", "dual"] * 2
    assert all(row["off ms"] > 0 and row["on ms"] > 0 for row in found.rows)


def test_tests_of_a_gpu_are_run_by_pytest(tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    gpu: a mark\n")
    marked = "import pytest\n@pytest.mark.gpu\ndef test_{0}(): assert {1}\n"
    (tmp_path / "tests" / "test_a.py").write_text(marked.format("good", 1) + "def test_plain(): assert 0\n")
    (tmp_path / "tests" / "test_none.py").write_text("raise RuntimeError\n")  # no mark: not even looked at
    place = Place(CPU.device, tmp_path, seconds=60)
    found = gpu_tests(place)
    assert not found.wrong and found.rows == [{"file": "tests.test_a", "passed": 1, "failed": 0, "skipped": 0}]
    (tmp_path / "tests" / "test_b.py").write_text(marked.format("bad", 0))
    found = gpu_tests(place)
    assert found.wrong == "1 of 2 tests failed (pytest ended with 1): test_bad." and len(found.rows) == 2
    assert gpu_tests(replace(place, seconds=3.01)).wrong.startswith("The tests marked gpu took more than 0 s")


def test_the_page_stands_alone_and_fits_small_screens():
    outcomes = [Outcome("rates", "Rates.", "passed", "", [{"a": 1}, {"b": 2.0}], 3.0)]
    about = {
        "device": "NVIDIA <H200>",
        "torch": "2",
        "threads": 8,
        "cpu_capability": "AVX2",
        "cuda": True,
        "tiny": False,
    }
    text = page(outcomes, about)
    assert "NVIDIA &lt;H200&gt;" in text and "Checks: 1 passed, 0 failed, 0 not run." in text
    assert "<td>1</td><td></td>" in text and "was run on a GPU" not in text
    assert "width=device-width" in text and "prefers-color-scheme: dark" in text and "overflow-x: auto" in text
    assert "src=" not in text and "href=" not in text and "<script" not in text


def test_all_checks_fit_into_eight_minutes():
    assert sum(check.seconds for check in CHECKS) + 15 <= gpu_check.LIMIT == 480
    assert len({check.name for check in CHECKS}) == len(CHECKS)


def test_the_command_starts_and_names_what_is_there(monkeypatch, tmp_path):
    recipe = runpy.run_path(str(ROOT / "inference" / "gpu_check.py"))
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--device", "cuda:9", "--out", str(tmp_path)])
    with pytest.raises(ValueError, match="'cuda:9' cannot be used here"):
        recipe["main"]()
    for name in TRAINED:
        assert read_config(ROOT / "configs" / f"{name}.yaml", []).model


@pytest.mark.slow
def test_the_command_runs_on_a_cpu(tmp_path):
    out = tmp_path / "checked"
    command = [sys.executable, str(ROOT / "inference" / "gpu_check.py"), "--device", "cpu", "--out", str(out)]
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, timeout=580)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "6 of 9 checks passed; not run: tests, draw, graphs" in done.stdout
        data = json.loads((out / "gpu-check.json").read_text())
        statuses = {c["name"]: c["status"] for c in data["checks"]}
        assert {n for n, s in statuses.items() if s == "not run"} == {"tests", "draw", "graphs"}
        assert all(c["reason"].startswith(NO_CUDA) for c in data["checks"] if c["status"] == "not run")
    assert "About" not in done.stdout and "training: Steps" not in done.stdout  # the second run made nothing again
