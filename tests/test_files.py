"""Files and folders appear complete or not at all."""

from __future__ import annotations

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
