"""What a package holds is found by looking into it; names are unique, and unknown ones are refused in one sentence."""

from __future__ import annotations

import sys

import pytest

from unidiff.registry import Registry


@pytest.fixture
def shapes(tmp_path, monkeypatch):
    folder = tmp_path / "some_shapes"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "round.py").write_text("class Circle:\n    shape = 'circle'\n")
    (folder / "straight.py").write_text("from some_shapes.round import Circle\nclass Square:\n    shape = 'square'\n")
    (folder / "_private.py").write_text("class Hidden:\n    shape = 'hidden'\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield folder
    for name in [name for name in sys.modules if name.split(".")[0] == "some_shapes"]:
        del sys.modules[name]


def registry() -> Registry:
    return Registry("shapes", "some_shapes", lambda value: getattr(value, "shape", None))


def test_entries_are_found_once_and_private_modules_are_left_out(shapes):
    assert list(registry()) == ["circle", "square"]


def test_a_new_file_is_a_new_entry(shapes):
    (shapes / "triangle.py").write_text("class Triangle:\n    shape = 'triangle'\n")
    assert set(registry()) == {"circle", "square", "triangle"}


def test_two_of_one_name_are_refused(shapes):
    (shapes / "zz.py").write_text("class Other:\n    shape = 'circle'\n")
    with pytest.raises(ValueError, match="two shapes are called 'circle'"):
        len(registry())


def test_an_unknown_name_gets_the_nearest(shapes):
    with pytest.raises(ValueError, match="shape is 'squar'; expected one of circle, square; did you mean 'square'"):
        registry().get_or_refuse("squar", "shape")
    with pytest.raises(ValueError, match="shape is 3; expected one of"):
        registry().get_or_refuse(3, "shape")
