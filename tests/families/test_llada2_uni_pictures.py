"""LLaDA2.0-Uni with all its parts: words to codes to pixels, pictures that are read, edits, and the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from released_pipelines import write_uni
from siglip_parts import write_image_parts

from unidiff.pipeline import UniDiffPipeline
from unidiff.tokens.image.flow import TURBO

QUICK: dict[str, Any] = {"steps": 2, "generator": 5}
SIZE: dict[str, int] = {"height": 16, "width": 8}  # 4 x 2 codes of 2 x 2 pixels, drawn twice as large


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made: Path = tmp_path_factory.mktemp("uni")
    write_uni(made, 32)  # marks for 32 rows and columns, the usual size
    write_image_parts(made)
    return made


@pytest.fixture
def pipe(folder) -> UniDiffPipeline:
    made = UniDiffPipeline.from_pretrained(folder)
    made.set_progress_bar_config(disable=True)
    made.images.decode_with("decoder", 3)
    return made


def test_words_to_pictures(pipe):
    drawn = pipe.text_to_image(["a red fox", "two owls on a hill"], output_type="pt", **QUICK, **SIZE)
    assert drawn.codes.shape == (2, 4, 2) and drawn.images.shape == (2, 3, 16, 8)
    assert torch.equal(drawn.images, pipe.images.decode(drawn.codes, drawn.seeds))
    alone = pipe.text_to_image("two owls on a hill", steps=2, generator=[int(drawn.seeds[1])], output_type="pt", **SIZE)
    assert torch.equal(alone.codes[0], drawn.codes[1]) and torch.equal(alone.images[0], drawn.images[1])
    pipe.images.decode_with("decoder-turbo")
    assert pipe.images.model.flow == TURBO
    turbo = pipe.text_to_image(["a red fox", "two owls on a hill"], output_type="pt", **QUICK, **SIZE)
    assert torch.equal(turbo.codes, drawn.codes) and not torch.equal(turbo.images, drawn.images)
    with pytest.raises(ValueError, match="image size 18x8 must be a positive multiple of 4"):
        pipe.text_to_image("a red fox", height=18, width=8)


def test_pictures_that_are_read_are_half_as_large(pipe):
    """A picture of 8 x 4 pixels has the 4 x 2 codes from which one of 16 x 8 is drawn."""
    given = torch.rand(3, 8, 4, generator=torch.Generator().manual_seed(0))
    told = pipe.answer(given, "what is it?", 4, **QUICK)
    assert told.codes.shape == (1, 4, 2) and torch.equal(told.codes, pipe.images.encode(given[None]))
    changed = pipe.edit(given, "make it blue", output_type="pt", **QUICK)
    assert changed.codes.shape == (1, 4, 2) and changed.images.shape == (1, 3, 16, 8)
    larger = pipe.edit(given, "make it blue", height=16, width=16, output_type="pt", **QUICK)
    assert larger.codes.shape == (1, 4, 4) and larger.images.shape == (1, 3, 16, 16)


def test_the_command_line_draws_and_describes(run, folder, tmp_path):
    common = ("--model", folder, "--device", "cpu", "--seed", 3, "--steps", 1)
    out = tmp_path / "fox.png"
    status, _, error = run("generate", "a red fox", *common, "--out", out, "--pixel-decoder", "decoder-turbo")
    assert status == 0, error
    assert Image.open(out).size == (128, 128)  # 32 x 32 codes
    status, said, error = run("caption", out, *common, "--max-text-tokens", 4, "--resize")
    assert status == 0 and said.strip(), error
