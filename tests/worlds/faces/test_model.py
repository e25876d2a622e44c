"""The model of faces that ships: small, attributed, and right on what it has learned surely."""

from __future__ import annotations

import pytest
import torch

from unidiff.pipeline import UniDiffPipeline
from unidiff.tokens.image.cell_table import CellTableModel
from unidiff.world import WORLDS
from unidiff.worlds.faces.cases import case_faces
from unidiff.worlds.faces.examples import PROMPTS
from unidiff.worlds.faces.language import parse_caption
from unidiff.worlds.faces.reader import read_faces
from unidiff.worlds.faces.scenes import LAYERS_FOLDER, render_batch


@pytest.fixture(scope="module")
def pipe() -> UniDiffPipeline:
    pipe = UniDiffPipeline.from_pretrained("faces")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_it_is_small_and_attributed():
    files = [path for path in LAYERS_FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 16e6
    assert not [path for path in files if path.suffix in {".pt", ".bin", ".pkl", ".ckpt"}]
    said = (LAYERS_FOLDER / "ATTRIBUTION.md").read_text(encoding="utf-8")
    assert "DiceBear" in said and "CC0 1.0" in said and "MIT License" in said


def test_its_image_tokenizer_is_the_worlds_own(pipe: UniDiffPipeline):
    assert isinstance(pipe.images.model, CellTableModel) and WORLDS["faces"].model is not None
    pictures = render_batch(case_faces("shipped", 8, 0, "all"))
    assert torch.equal((pipe.images.decode(pipe.images.encode(pictures)) * 255).round(), (pictures * 255).round())


def test_it_draws_backgrounds_hats_and_skins(pipe: UniDiffPipeline):
    wanted = ("background", "hat", "skin")
    facts = [{n: v for n, v in (parse_caption(prompt) or {}).items() if n in wanted} for prompt in PROMPTS]
    drawn = pipe.text_to_image(list(PROMPTS), generator=0, output_type="pt").images
    right = [r.value(n) == v for r, own in zip(read_faces(drawn), facts, strict=True) for n, v in own.items()]
    assert len(right) >= 12 and sum(right) >= 0.75 * len(right)


def test_it_takes_any_picture(pipe: UniDiffPipeline):
    noise = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert len(pipe.caption(noise, steps=2).texts) == 2
    assert len(pipe.answer(noise, ["what colour is the hair?"] * 2, steps=2).texts) == 2
