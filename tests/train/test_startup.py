"""How recipes start and end."""

from __future__ import annotations

import subprocess
import sys

import pytest
from train_fixtures import tiny_config, tiny_table

from unidiff.errors import exit_status
from unidiff.process import set_up_process
from unidiff.train.run.distributed import launch_of
from unidiff.train.trainer import train


def test_threads_are_set_up_before_torch_and_what_the_person_set_stays():
    environment = {"OMP_WAIT_POLICY": "active"}
    set_up_process(environment)
    assert environment["OMP_WAIT_POLICY"] == "active" and environment["GOMP_SPINCOUNT"] == "0"
    program = "import sys, unidiff.process, unidiff.train.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=120).returncode == 0


def test_torchrun_is_recognised_by_all_of_its_names():
    environment = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "::1", "MASTER_PORT": "29500"}
    launch = launch_of(environment)
    assert (launch.rank, launch.world_size, launch.local_rank) == (3, 4, 1)
    assert (launch.address, launch.port) == ("::1", 29500)
    for name in environment:
        assert launch_of({k: v for k, v in environment.items() if k != name}) is None


def test_errors_are_lines(capsys):
    def fail(error):
        raise error

    assert exit_status(lambda: None) == 0 and exit_status(lambda: 1) == 1
    assert exit_status(lambda: fail(ValueError("lr = 0")), failed=2) == 2
    assert exit_status(lambda: fail(ImportError("no such reward")), ImportError, failed=2) == 2
    assert capsys.readouterr().err == "error: lr = 0\nerror: no such reward\n"
    assert exit_status(lambda: fail(ImportError("a mistake of ours"))) == 70
    assert "Please report it" in capsys.readouterr().err


@pytest.mark.training
def test_a_run_checks_its_tokens_first_and_finishes_or_is_aborted(tmp_path, capsys):
    table = tmp_path / "table.safetensors"
    tiny_table(72).save(table)
    common = [f"data.train={table}", "steps=2"]
    calls = []

    def check(source):
        calls.append(source.vocabulary.size)
        assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]

    def finish():
        calls.append((tmp_path / "run" / "model" / "config.json").is_file())

    assert train(tiny_config(tmp_path / "run", *common), {}, check, finish) == 0
    assert calls == [tiny_table(1).vocabulary.size, True]
    wild = [*common, "optimiser.lr=1e30", "max_bad_steps=1", "steps=9", "precision=fp32"]
    assert train(tiny_config(tmp_path / "wild", *wild), {}, finish=finish) == 1
    assert len(calls) == 2 and capsys.readouterr().err.startswith("error: 1 steps in a row")
