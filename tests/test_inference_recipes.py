"""The recipes in inference/ run as they are, here on a model with random weights in place of the embedded one."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
from emoji_fakes import vocabulary_words
from tiny_pipeline import tiny_pipeline

from unidiff import hub
from unidiff.worlds.emoji.demo import PROMPTS
from unidiff.worlds.emoji.scenes import get_profile

RECIPES = Path(__file__).resolve().parents[1] / "inference"


@pytest.fixture
def embedded(tmp_path, monkeypatch):
    """A stand-in for the embedded model, and an empty working directory."""
    corpus = [p for p, _ in PROMPTS] * 2 + vocabulary_words(get_profile("cpu")) * 2
    tiny_pipeline(text_length=40, grid=(8, 8), corpus=corpus).save_pretrained(tmp_path / "model")
    monkeypatch.setattr(hub, "embedded_models", lambda: {"emoji": tmp_path / "model"})
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("text_to_image", {"0.png", "1.png", "2.png", "3.png", "decode.gif", "filmstrip.png"}),
        ("caption", set()),
        ("joint_inpaint", {"before.png", "after.png", "filmstrip.png"}),
    ],
)
def test_recipe_runs(embedded, monkeypatch, capsys, name, files):
    path = RECIPES / f"{name}.py"
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 40
    monkeypatch.setattr(sys, "argv", [str(path)])
    runpy.run_path(str(path), run_name="__main__")
    assert {p.name for p in Path("out").rglob("*") if p.is_file()} == files
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize(
    ("name", "arguments", "status", "said"),
    [
        ("text_to_image", ["--help"], 0, "usage:"),
        ("text_to_image", ["--model", "nowhere"], 2, "unrecognized arguments"),
        ("caption", ["nothing.png"], 2, "error: image file 'nothing.png' does not exist"),
        ("caption", ["cut.png"], 2, "error: 'cut.png' cannot be read as a picture"),
    ],
)
def test_what_a_recipe_cannot_use_is_said_in_one_sentence(embedded, monkeypatch, capsys, name, arguments, status, said):
    Path("cut.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(RECIPES / f"{name}.py"), run_name="__main__")
    assert stopped.value.code == status and said in "".join(capsys.readouterr()) and not Path("out").exists()
