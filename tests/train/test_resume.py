"""The command line: SIGKILL and resume bit for bit, SIGTERM, bad input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from forked_runs import RECIPE, forked
from safetensors.torch import load_file
from train_fixtures import MIXED, TINY, tiny_table

CLOCKS = ("time", "seconds_per_step", "tokens_per_second", "tflops", "data_wait")


def start(folder: Path, table: Path, *overrides: str) -> subprocess.Popen:
    config = folder.parent / "config.yaml"
    config.write_text("seed: 3\n")
    arguments = [*TINY, *MIXED, f"output={folder}", f"data.train={table}", "accumulate=2", *overrides]
    return subprocess.Popen(
        [sys.executable, str(RECIPE), str(config), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_step(folder: Path, step: int, process: subprocess.Popen) -> None:
    """Until the log shows `step`."""
    metrics = folder / "metrics.jsonl"
    for _ in range(2400):
        if metrics.is_file() and any(f'"step": {step},' in line for line in metrics.read_text().splitlines()):
            return
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    raise AssertionError(f"step {step} was not reached")


def check_killed_run(tmp_path: Path, ends: list[str], steps: int, ranks: int, *overrides: str) -> list[dict]:
    """An uninterrupted run and one with these ends; both must hold the same numbers, bit for bit, and the same log."""
    table = tmp_path / "table.safetensors"
    tiny_table(72).save(table)
    common = [*TINY, *MIXED, f"data.train={table}", "accumulate=2", f"steps={steps}", "checkpoint.every=3"]
    common += ["logging.every=1", "data.crop_fill=0.3", "model.dropout=0.1", "schedule.name=wsd"]
    common += ["logging.validate_every=25", *overrides]
    whole = {"arguments": [*common, f"output={tmp_path / 'whole'}"], "ranks": ranks}
    cut = {"arguments": [*common, f"output={tmp_path / 'cut'}"], "ranks": ranks}
    results = forked(tmp_path / "driver", [whole, *({**cut, "end": end} for end in ends), cut])[1:-1]
    assert all(set(r["codes"]) == {-signal.SIGKILL} for r in results), results

    for part in (f"checkpoints/step-{steps:08d}", "model"):
        expected, found = (
            {p.relative_to(tmp_path / run): load_file(p) for p in (tmp_path / run / part).rglob("*.safetensors")}
            for run in ("whole", "cut")
        )
        assert expected and set(expected) == set(found)
        for path, tensors in expected.items():  # not the files' bytes: the order of tensors in them may differ
            assert set(tensors) == set(found[path])
            assert all(torch.equal(value, found[path][name]) for name, value in tensors.items()), path
    logs = [
        [{k: v for k, v in json.loads(line).items() if k not in CLOCKS} for line in text.splitlines()]
        for text in ((tmp_path / run / "metrics.jsonl").read_text() for run in ("whole", "cut"))
    ]
    assert logs[0] == logs[1]  # no step twice, none lost
    strays = [p.name for p in (tmp_path / "cut").rglob(".*")]
    assert not strays  # what killed processes left half-written is gone
    return results


@pytest.mark.training
def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(tmp_path):
    check_killed_run(tmp_path, ["kill", "kill saving", "kill", "kill saving"], 40, 1)


@pytest.mark.slow
@pytest.mark.training
def test_thirty_kills_equal_the_uninterrupted_run_bit_for_bit(tmp_path):
    results = check_killed_run(tmp_path, ["kill", "kill saving"] * 15, 240, 1)
    assert sum(r["saving"] for r in results) >= 5


@pytest.mark.slow
@pytest.mark.training
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_killed_ranks_equal_the_uninterrupted_run_bit_for_bit(tmp_path, mode):
    results = check_killed_run(tmp_path, ["kill", "kill saving"] * 3, 60, 2, f"parallel.mode={mode}")
    assert any(r["saving"] for r in results)


@pytest.mark.training
def test_sigterm_saves_and_exits_with_zero(tmp_path):
    table = tmp_path / "table.safetensors"
    tiny_table(72).save(table)
    process = start(tmp_path / "run", table, "steps=100000", "checkpoint.every=0", "logging.every=1")
    wait_for_step(tmp_path / "run", 3, process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    name = (tmp_path / "run" / "checkpoints" / "latest").read_text().strip()
    state = json.loads((tmp_path / "run" / "checkpoints" / name / "state.json").read_text())
    assert state["step"] >= 3 and state["samples"] == 16 * state["step"]
    assert load_file(tmp_path / "run" / "checkpoints" / name / "model.safetensors")
    assert (tmp_path / "run" / "model" / "config.json").is_file()


def recipe_main():
    """`main` of the recipe, without a process of its own."""
    import importlib.util

    before = dict(os.environ)
    spec = importlib.util.spec_from_file_location("pretrain_recipe", RECIPE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    os.environ.clear()
    os.environ.update(before)
    return module.main


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["modle.hidden_size=3"], "modle"),
        (["model.hiden_size=3"], "hiden_size"),
        (["model.hidden_size=wide"], "model.hidden_size = 'wide'"),
        (["steps=many"], "many"),
        (["steps=0"], "steps = 0"),
        (["steps"], "key=value"),
        (["optimiser.name=sgd"], "optimiser.name = 'sgd'"),
        (["tasks.joint.rate=slow"], "tasks.joint.rate = 'slow'"),
        (["tasks.t2i.dropout=2"], "tasks.t2i.dropout"),
        (["tasks.joint.weight=0"], "no task"),
        (["data.train=/nowhere/table.safetensors"], "does not exist"),
        (["data.validation_rows=72"], "leaves nothing"),
        (["checkpoint.init_from=/nowhere"], "/nowhere"),
        (["device=tpu9"], "tpu9"),
        (["data.curriculum=[[0, -1]]"], "level up to -1"),
    ],
)
def test_bad_input_is_one_sentence_and_a_failing_exit(tmp_path, capsys, overrides, message):
    table = tmp_path / "table.safetensors"
    tiny_table(72).save(table)
    config = tmp_path / "config.yaml"
    config.write_text(f"steps: 1\noutput: {tmp_path / 'run'}\ndata: {{train: {table}}}\n")
    assert recipe_main()([str(config), *TINY, *overrides]) != 0
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and message in error and "\n" not in error
    assert not (tmp_path / "run").exists()


def test_missing_or_broken_config_file(tmp_path, capsys):
    assert recipe_main()([str(tmp_path / "none.yaml")]) != 0
    assert "does not exist" in capsys.readouterr().err
    (tmp_path / "broken.yaml").write_text("steps: [1\n")
    assert recipe_main()([str(tmp_path / "broken.yaml")]) != 0
    assert capsys.readouterr().err.startswith("error: ")
    assert recipe_main()([]) != 0
    assert recipe_main()(["--help"]) == 0


def test_every_committed_training_config_loads():
    from unidiff.train.config import read_config

    config = read_config(RECIPE.parents[1] / "configs" / "emoji.yaml")
    assert config.tasks.t2i.weight > 0 and config.model["hidden_size"] > 0
