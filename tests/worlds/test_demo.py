"""The demo's sheet and page on a model with random weights: everything is there, and nothing is left out."""

from __future__ import annotations

import base64
import io
import re

import pytest
from emoji_fakes import vocabulary_words
from PIL import Image
from tiny_pipeline import tiny_pipeline

from unidiff.pipelines.sheet import EDGE, GAP, Cell, draw_sheet
from unidiff.worlds.emoji.demo import PROMPTS, run_demo
from unidiff.worlds.emoji.language import caption_distribution
from unidiff.worlds.emoji.scenes import get_profile, held_out


def test_prompts_describe_their_scenes_in_the_training_grammar():
    assert len(PROMPTS) >= 8 and len({scene.background for _, scene in PROMPTS}) == 8
    for prompt, scene in PROMPTS:
        assert prompt in caption_distribution(scene) and not held_out(scene)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page of a run with random weights."""
    corpus = [p for p, _ in PROMPTS] * 2 + ["what is the background? how many are there? is there a"] * 2
    pipe = tiny_pipeline(text_length=40, grid=(2, 2), corpus=corpus + vocabulary_words(get_profile("cpu")) * 2)
    return run_demo(pipe, tmp_path_factory.mktemp("demo") / "out", seed=1)[1]


def test_demo_writes_a_sheet_and_a_page(page):
    png = page.with_name("demo.png")
    assert sorted(p.name for p in page.parent.iterdir()) == ["demo.html", "demo.png"]
    with Image.open(png) as sheet:
        assert sheet.format == "PNG" and sheet.width > 1000 and sheet.height > 1000
    text = page.read_text(encoding="utf-8")
    for prompt, _ in PROMPTS:
        assert prompt in text
    for heading in ("Text to image", "Captions", "Answers", "Joint inpainting", "Joint generation"):
        assert heading in text
    assert "http" not in text and "<script" not in text and "<link" not in text  # self-contained
    pictures = re.findall(r"data:image/png;base64,([^\"]+)", text)
    assert len(pictures) >= 2 * len(PROMPTS) + 8 + 8 + 3 * 4 + 8
    for data in pictures:
        assert Image.open(io.BytesIO(base64.b64decode(data))).size == (16, 16)


def test_the_page_suits_telephones_readers_and_the_dark(page):
    text = page.read_text(encoding="utf-8")
    assert (
        'name="viewport"' in text and "prefers-color-scheme: dark" in text and "outline: 1px solid var(--line)" in text
    )
    alts = re.findall(r"<img alt=\"([^\"]*)\"", text)
    assert len(alts) == text.count("<img") and all(alts) and len(set(alts)) > 2 * len(PROMPTS)
    for prompt, _ in PROMPTS:
        assert f"drawn by the model: {prompt}" in alts and f"a true scene: {prompt}" in alts


def test_the_page_shows_how_rows_appear(page):
    text = page.read_text(encoding="utf-8")
    moving = [Image.open(io.BytesIO(base64.b64decode(d))) for d in re.findall(r"data:image/gif;base64,([^\"]+)", text)]
    assert len(moving) == 8 and all(gif.size == (16, 16) for gif in moving)
    assert all(gif.n_frames >= 3 for gif in moving[:4])  # 4 codes, the surest first
    assert text.count("prefers-reduced-motion: reduce") == 8 and text.count("<details>") >= 1


def test_pale_pictures_have_an_edge():
    sheets = [draw_sheet([[Cell((Image.new("RGB", (16, 16), colour),))]]) for colour in ("white", "red")]
    pale, red = (sheet.getpixel((GAP, GAP)) for sheet in sheets)
    assert pale == EDGE and red == (255, 0, 0)


def test_demo_refuses_pictures_it_has_no_scenes_for(tmp_path):
    with pytest.raises(ValueError, match="square pictures"):
        run_demo(tiny_pipeline(), tmp_path / "out")
    assert not (tmp_path / "out").exists()
