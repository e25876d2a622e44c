"""The demo's sheet and page on a model with random weights: everything is there, and nothing is left out."""

from __future__ import annotations

import base64
import io
import re

import pytest
from emoji_fakes import vocabulary_words
from PIL import Image
from tiny_pipeline import tiny_pipeline

from unidiff.worlds.emoji.demo import PROMPTS, run_demo
from unidiff.worlds.emoji.language import caption_distribution
from unidiff.worlds.emoji.scenes import get_profile, held_out


def test_prompts_describe_their_scenes_in_the_training_grammar():
    assert len(PROMPTS) >= 8 and len({scene.background for _, scene in PROMPTS}) == 8
    for prompt, scene in PROMPTS:
        assert prompt in caption_distribution(scene) and not held_out(scene)


def test_demo_writes_a_sheet_and_a_page(tmp_path):
    corpus = [p for p, _ in PROMPTS] * 2 + ["what is the background? how many are there? is there a"] * 2
    pipe = tiny_pipeline(text_length=40, grid=(2, 2), corpus=corpus + vocabulary_words(get_profile("cpu")) * 2)
    png, page = run_demo(pipe, tmp_path / "out", seed=1)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["demo.html", "demo.png"]
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


def test_demo_refuses_pictures_it_has_no_scenes_for(tmp_path):
    with pytest.raises(ValueError, match="square pictures"):
        run_demo(tiny_pipeline(), tmp_path / "out")
    assert not (tmp_path / "out").exists()
