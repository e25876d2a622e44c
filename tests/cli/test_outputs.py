"""What a command will write is checked before any work: places, links, two names of one file, inputs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from unidiff.cli.common import check_folder, check_outputs, numbered


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "b.png", "in.json"):
        Path(name).write_text(name)
    Path("folder.png").mkdir()
    Path("below").mkdir()
    Path("link.png").symlink_to("a.png")
    Path("linked").symlink_to("below")
    Path("new-link.png").symlink_to("below/new.png")
    Path("loop.png").symlink_to("loop.png")
    Path("full.png").symlink_to("/dev/full")
    os.link("a.png", "hard.png")
    os.mkfifo("fifo.png")
    Path("locked.png").write_text("mine")
    Path("locked.png").chmod(0o444)
    return tmp_path


FINE = [
    {"out": "a.png", "filmstrip": "b.png"},
    {"out": "new/deep/o.png", "gif": "new/deep/o.gif", "filmstrip": "new/o.png"},
    {"out": "o.png", "filmstrip": "o.webp", "gif": "o.gif"},
    {"out": "o.png", "filmstrip": "o-1.png"},
    {"out": "o.png", "filmstrip": "o.png", "count": 2},  # the pictures are o-1.png and o-2.png
    {"out": "o.png", "filmstrip": "o-3.png", "count": 2},
    {"out": "o.png", "filmstrip": "o-1.png", "count": 10},  # o-01.png
    {"out": "**.png", "gif": "[x]?.gif"},
    {"out": "link.png"},
    {"out": "new-link.png"},
    {"out": "O.PNG"},
    {"json_file": "o.json", "inputs": ["in.json", None]},
    {"out": "o.png", "inputs": ["a.png"]},
]
CLASHES = [
    {"out": "o.png", "filmstrip": "o.png"},
    {"out": "o.png", "filmstrip": "./o.png"},
    {"out": "o.png", "filmstrip": "below/../o.png"},
    {"out": "below/o.png", "filmstrip": "linked/o.png"},
    {"out": "below/new.png", "filmstrip": "new-link.png"},
    {"out": "a.png", "filmstrip": "link.png"},
    {"out": "a.png", "filmstrip": "hard.png"},
    {"out": "link.png", "filmstrip": "hard.png"},
    {"out": "o.png", "filmstrip": "O.PNG"},
    {"out": "stra\u00dfe.png", "filmstrip": "STRASSE.png"},
    {"out": "\u00fc.png", "filmstrip": "u\u0308.png"},
    {"out": "o.png", "filmstrip": "o-1.png", "count": 2},
    {"out": "o.png", "filmstrip": "o-07.png", "count": 12},
]
INPUTS = [
    {"out": "a.png", "inputs": ["a.png"]},
    {"out": "./below/../a.png", "inputs": ["a.png"]},
    {"out": "link.png", "inputs": ["a.png"]},
    {"out": "a.png", "inputs": ["link.png"]},
    {"out": "hard.png", "inputs": ["a.png"]},
    {"filmstrip": "a.png", "inputs": ["b.png", "a.png"]},
    {"out": "a.png", "inputs": ["a-2.png"], "count": 2},
    {"json_file": "in.json", "inputs": [None, "in.json"]},
]
PLACES = {
    "o.gif": "must end in .png or",
    "o": "must end in .png or",
    "": "must end in .png or",
    ".png": "must end in .png or",
    "folder.png": "is a folder",
    "a.png/o.png": "'a.png', which is a file|a.png', which is a file",
    "full.png": "no ordinary file",
    "fifo.png": "no ordinary file",
    "locked.png": "write-protected",
    "x" * 250 + ".png": "too long a name",
    "a\0.png": "zero byte",
}


def asked(given: dict) -> dict:
    return {
        name: [p and Path(p) for p in value] if name == "inputs" else value if name == "count" else Path(value)
        for name, value in given.items()
    }


@pytest.mark.parametrize("given", FINE, ids=str)
def test_fine_outputs(given, place):
    before = sorted(place.rglob("*"))
    check_outputs(**asked(given))
    assert sorted(place.rglob("*")) == before  # a check makes nothing


@pytest.mark.parametrize("given", CLASHES, ids=str)
def test_two_outputs_in_one_file(given):
    if "count" in given and given["count"] == 2 and "a.png" in given:
        Path("a-2.png").write_text("in")
    with pytest.raises(
        ValueError, match=r"^--out .* and --filmstrip .* are the same file; name another for one of them$"
    ):
        check_outputs(**asked(given))


@pytest.mark.parametrize("given", INPUTS, ids=str)
def test_an_input_is_not_written_over(given):
    Path("a-2.png").write_text("in")
    with pytest.raises(ValueError, match="would overwrite the input"):
        check_outputs(**asked(given))


@pytest.mark.parametrize("name", PLACES, ids=lambda name: repr(name[:20]))
def test_places_that_cannot_be_written(name):
    with pytest.raises(ValueError, match=PLACES[name]) as caught:
        check_outputs(out=Path(name))
    assert len(str(caught.value)) < 300 and "\n" not in str(caught.value)


def test_links_in_a_circle_and_endless_names_are_errors_of_the_system():
    for name in ("loop.png", "x" * 5000 + ".png"):
        with pytest.raises(OSError):
            check_outputs(out=Path(name))


def test_folders_that_cannot_be_written(monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # the tests may run as root, who may write anywhere
    with pytest.raises(ValueError, match="is read-only or belongs to somebody else"):
        check_outputs(out=Path("new/o.png"))


def test_a_folder_and_its_files():
    check_folder(Path("new/folder"), ["demo.png"])
    check_folder(Path("below"), ["demo.png"])
    with pytest.raises(ValueError, match="is a file; name a folder"):
        check_folder(Path("a.png"), ["demo.png"])
    Path("below/demo.png").mkdir()
    with pytest.raises(ValueError, match="is a folder; name a file"):
        check_folder(Path("below"), ["demo.png"])


def test_numbers():
    assert numbered(Path("a/b.c.png"), 1) == [Path("a/b.c.png")]
    assert numbered(Path("a/b.c.png"), 2) == [Path("a/b.c-1.png"), Path("a/b.c-2.png")]
    assert numbered(Path("**.png"), 12)[0] == Path("**-01.png")
