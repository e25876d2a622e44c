"""The command line: SIGKILL and resume bit for bit, SIGTERM, bad input."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from forked_runs import RECIPE, check_same_runs, forked, recipe_main, start, wait_for_step
from safetensors.torch import load_file
from train_fixtures import MIXED, TINY, tiny_table


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
    check_same_runs(tmp_path, steps)
    return results


@pytest.mark.training
def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(tmp_path):
    check_killed_run(tmp_path, ["kill early", "kill", "kill saving", "kill exporting", "kill", "kill saving"], 40, 1)


@pytest.mark.slow
@pytest.mark.training
def test_thirty_kills_equal_the_uninterrupted_run_bit_for_bit(tmp_path):
    results = check_killed_run(
        tmp_path, ["kill", "kill saving", "kill exporting", "kill early"] * 7 + ["kill"] * 2, 240, 1
    )
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


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["modle.hidden_size=3"], "modle"),
        (["model.hiden_size=3"], "hiden_size"),
        (["model.hidden_size=wide"], "model.hidden_size is 'wide'"),
        (["steps=many"], "many"),
        (["steps=0"], "steps is 0"),
        (["steps"], "key=value"),
        (["optimiser.name=sgd"], "optimiser.name is 'sgd'"),
        (["tasks.generate.rate=slow"], "tasks.generate.rate = 'slow'"),
        (["tasks.text_to_image.dropout=2"], "tasks.text_to_image.dropout"),
        (["tasks.generate.weight=0"], "no task"),
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
    assert config.tasks.text_to_image.weight > 0 and config.model["hidden_size"] > 0
