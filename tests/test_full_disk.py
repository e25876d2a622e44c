"""A disk that is full, or that nobody may write to: one sentence with the folder's name, and everything as it was."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from folder_trees import tree
from released_parts import write_tiny
from tiny_pipeline import tiny_parts, tiny_pipeline

from unidiff.errors import explain
from unidiff.families.checkpoint.convert import convert
from unidiff.pipelines.pack import pack_pipeline
from unidiff.tokens.text import TextTokenizer


@contextmanager
def largest_file(count: int) -> Iterator[None]:
    """No file of this process may grow beyond `count` bytes: the system's own way to say that there is no room."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    transformer, image, text, _ = tiny_parts()
    for part, name in ((transformer, "t"), (image, "i"), (text, "x")):
        part.save_pretrained(folder / name)
    write_tiny(folder / "llada", "llada")
    tiny_pipeline(1).save_pretrained(folder / "old")
    return folder


WORK = {
    "save_pretrained": lambda s, out: tiny_pipeline().save_pretrained(out),
    "pack": lambda s, out: pack_pipeline(s / "t", s / "i", s / "x", out, text_length=10, image_size=(16, 24)),
    "convert": lambda s, out: convert(s / "llada", out),
    "a model": lambda s, out: tiny_parts()[0].save_pretrained(out),
    "words": lambda s, out: TextTokenizer.train(["a dog"] * 9, 300).save_pretrained(out),
}


@pytest.mark.parametrize("name", WORK)
@pytest.mark.parametrize("room", [0, 100, 1_000, 5_000])
def test_a_full_disk(sources, tmp_path, name, room):
    out = tmp_path / "deep" / "out"
    with pytest.raises((OSError, ValueError)) as caught, largest_file(room):
        WORK[name](sources, out)
    said = explain(caught.value)
    assert said is not None and str(out) in said and "\n" not in said and ".tmp" not in said, said
    assert not (out.exists() and list(out.rglob("*"))), tree(tmp_path)
    assert not [p for p in out.parent.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize("name", ["save_pretrained", "pack"])
@pytest.mark.parametrize("room", [0, 300, 9_000, 20_000])
def test_the_old_folder_survives_a_full_disk(sources, tmp_path, name, room):
    out = tmp_path / "out"
    tiny_pipeline(1).save_pretrained(out)
    before = tree(out)
    with pytest.raises((OSError, ValueError)) as caught, largest_file(room):
        WORK[name](sources, out)
    said = explain(caught.value)
    assert said is not None and str(out) in said and "\n" not in said
    assert tree(out) == before and [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO, errno.EDQUOT])
@pytest.mark.parametrize("name", WORK)
def test_whatever_the_system_says_while_names_change(sources, tmp_path, monkeypatch, name, number):
    out = tmp_path / "out"

    def fails(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("unidiff.files.os.replace", fails)
    with pytest.raises(OSError) as caught:
        WORK[name](sources, out)
    said = explain(caught.value)
    assert said is not None and str(out) in said and "\n" not in said
    assert not (out.exists() and list(out.rglob("*"))) and not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize("name", WORK)
def test_places_where_nothing_can_be_written(sources, tmp_path, name):
    (tmp_path / "file").write_text("mine")
    for out in ("/proc/unidiff", "/proc/unidiff/deep", "/dev/null/out", tmp_path / "file" / "out", tmp_path / "file"):
        with pytest.raises((OSError, ValueError)) as caught:
            WORK[name](sources, Path(out))
        said = explain(caught.value)
        assert said is not None and "\n" not in said and ".tmp" not in said and len(said) > 20, said
    assert (tmp_path / "file").read_text() == "mine" and [p.name for p in tmp_path.iterdir()] == ["file"]
