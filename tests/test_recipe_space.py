"""Every recipe takes every command line: it works, or ends with a sentence and status 1 or 2; nothing else changes.

Fast: seed 1, 54 lines in this process. Slow: seed 2, 756 lines in this process, and seed 3, 36 lines as processes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from recipe_space import RECIPES, ROOT, SECONDS, build, fresh, lines, run, snapshot

from unidiff import hub

pytestmark = pytest.mark.training


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    build(folder)
    return folder


def check(status: object, err: str, line: str, world: Path, before: dict) -> None:
    assert status in (0, 1, 2), f"{line}\n{status!r}\n{err[-2000:]}"
    assert "Traceback" not in err and "Please report" not in err, f"{line}\n{err[-2000:]}"
    assert status == 0 or err.strip(), line
    assert snapshot(world) == before, line


def in_process(world: Path, monkeypatch: pytest.MonkeyPatch, seed: int, count: int) -> list[object]:
    monkeypatch.chdir(world)
    monkeypatch.setattr(hub, "embedded_models", lambda: {"emoji": world / "base"})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    before, found, wrong = snapshot(world), [], []
    for path, words, empty in lines(seed, count):
        fresh(world, empty)
        status, _, err = run(path, words)
        found.append(status)
        try:
            check(status, err, f"{path} {words}", world, before)
        except AssertionError as error:
            wrong.append(str(error)[:1500])
            before = snapshot(world)
    assert not wrong, f"{len(wrong)} of {count} lines\n" + "\n----\n".join(wrong[:20])
    assert Path("/dev/full").is_char_device() and Path("/dev/null").is_char_device()
    return found


def test_a_sample_of_lines(world, monkeypatch):
    found = in_process(world, monkeypatch, 1, 3 * len(RECIPES))
    assert found.count(0) >= 15  # the right ones work
    assert sum(s in (1, 2) for s in found) >= 20


@pytest.mark.slow
def test_seven_hundred_lines(world, monkeypatch):
    found = in_process(world, monkeypatch, 2, 42 * len(RECIPES))
    assert len(found) >= 700 and sum(s in (1, 2) for s in found) >= 400


@pytest.mark.slow
def test_lines_as_processes(world):
    before = snapshot(world)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    wrong = []
    for path, words, empty in lines(3, 2 * len(RECIPES)):
        words = [word for word in words if "\x00" not in word]  # no system has such words
        fresh(world, empty)
        done = subprocess.run(
            [sys.executable, str(ROOT / path), *map(os.fsencode, words)],
            cwd=world,
            env=environment,
            capture_output=True,
            timeout=2 * SECONDS,
        )
        try:
            check(done.returncode, done.stderr.decode("utf-8", "replace"), f"{path} {words}", world, before)
        except AssertionError as error:
            wrong.append(str(error)[:1500])
    assert not wrong, "\n----\n".join(wrong)
