"""`unidiff eval` as a person runs it: its spellings, and a report that a kill does not change."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from emoji_fakes import tiny_emoji_pipeline

from unidiff.cli.evaluation import model_and_suite

STOPPED = """
import os, signal, sys
from unidiff.evaluation import kept
from unidiff.pipelines import batch

left, write = int(sys.argv.pop(1)), kept.add_to_manifest


def add(out, entries):
    global left
    left -= 1
    if left < 0:
        with open(out / batch.MANIFEST, "ab") as file:
            file.write(b'{"row": "half a li')
        os.kill(os.getpid(), signal.SIGKILL)
    write(out, entries)


kept.add_to_manifest = add
from unidiff import cli

sys.argv[0] = "unidiff"
cli.main()
"""


def test_models_and_suites_by_all_spellings():
    assert model_and_suite("emoji", None, None) == ("emoji", "emoji")
    assert model_and_suite("runs/mine", None, None) == ("runs/mine", "emoji")
    assert model_and_suite("runs/mine", "geneval", None) == ("runs/mine", "geneval")
    assert model_and_suite("emoji", None, "runs/mine") == ("runs/mine", "emoji")  # as older versions had it
    for model, suite in (("runs/mine", None), ("emoji", "emoji")):
        with pytest.raises(ValueError, match="write `unidiff eval other --suite NAME`"):
            model_and_suite(model, suite, "other")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("eval") / "model"
    tiny_emoji_pipeline().save_pretrained(folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_run_that_was_killed_twice_ends_with_the_same_files(model, tmp_path):
    tasks = ["--task", "caption", "--task", "inpaint", "--task", "likelihood"]
    words = ["eval", model, "--suite", "emoji", "--n", 2, "--batch-size", 2, "--steps", 1, *tasks, "--out"]

    def run(out: Path, stop: int | None = None, *more: object) -> subprocess.CompletedProcess[str]:
        start = ["-m", "unidiff"] if stop is None else ["-c", STOPPED, stop]
        line = [sys.executable, *map(str, [*start, *words, out, *more])]
        return subprocess.run(line, capture_output=True, text=True, timeout=550)

    for stop in (1, 2):
        assert run(tmp_path / "killed", stop).returncode == -9
        assert not (tmp_path / "killed" / "report.html").exists()
    lines = (tmp_path / "killed" / "rows" / "manifest.jsonl").read_bytes().splitlines()
    assert len(lines) == 1 + 2 * 3 + 1 and lines[-1] == b'{"row": "half a li'
    done = run(tmp_path / "killed")
    assert done.returncode == 0 and str(tmp_path / "killed" / "report.html") in done.stdout, done.stderr
    whole = run(tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    found, expected = contents(tmp_path / "killed"), contents(tmp_path / "whole")
    assert found.keys() == expected.keys() and {"report.html", "report.json", "cases.csv"} <= found.keys()
    assert [name for name in found if found[name] != expected[name]] == []
    about = json.loads(found["report.json"])["about"]
    assert about["suite"] == "emoji" and about["model"] == str(model) and len(about["model_hash"]) == 64

    other = run(tmp_path / "whole", None, "--seed", 1)
    assert (
        other.returncode == 1
        and "has seed = 0, here 1; use the same to continue it, or another folder (--out)" in other.stderr
    )
    assert contents(tmp_path / "whole") == expected


def test_files_of_something_else_stay(model, tmp_path):
    (tmp_path / "report.html").write_text("mine")
    line = [sys.executable, "-m", "unidiff", "eval", str(model), "--n", "1", "--out", str(tmp_path)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=550)
    assert done.returncode == 1 and "is there and of another command; name another folder" in done.stderr
    assert contents(tmp_path) == {"report.html": b"mine"}
