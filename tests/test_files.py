"""Files and folders appear complete or not at all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from unidiff.files import replacing, replacing_folder


def test_a_file_is_replaced_as_a_whole_or_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.txt"
    with replacing(path) as temporary:
        temporary.write_text("one")
        assert not path.exists()
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "one"
    assert [p.name for p in path.parent.iterdir()] == ["a.txt"]


def test_what_a_killed_process_left_goes_and_what_a_running_one_writes_stays(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    stray, other = tmp_path / f".a.txt.{ended.pid}.tmp", tmp_path / f".a.txt.{os.getppid()}.tmp"
    for path in (stray, other):
        path.write_text("half")
    with replacing(tmp_path / "a.txt") as temporary:
        temporary.write_text("one")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["a.txt", other.name])


def test_a_folder_is_replaced_as_a_whole_or_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "model"
    for word in ("one", "two"):
        with replacing_folder(target) as temporary:
            (temporary / word).write_text(word)
    (tmp_path / ".model.123.tmp").mkdir()  # left by a killed process
    with pytest.raises(RuntimeError), replacing_folder(target) as temporary:
        (temporary / "half").write_text("half")
        raise RuntimeError
    assert [p.name for p in target.iterdir()] == ["two"]
    with replacing_folder(target) as temporary:
        (temporary / "three").write_text("3")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
