"""The embedded model: small enough to ship, and visibly right on a handful of fixed cases."""

from __future__ import annotations

import pytest
import torch

from unidiff.pipeline import UniDiffPipeline
from unidiff.worlds.emoji.language import parse_caption
from unidiff.worlds.emoji.oracle import Oracle
from unidiff.worlds.emoji.scenes import ATLAS_FOLDER, LARGE, Scene, SceneObject, get_profile, render_batch

MEGABYTE = 1e6
CASES = [("fox", "green"), ("octopus", "blue"), ("pizza", "purple"), ("red apple", "gray"), ("penguin", "red")]


@pytest.fixture(scope="module")
def pipe() -> UniDiffPipeline:
    pipe = UniDiffPipeline.from_pretrained("emoji")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_assets_are_small_and_attributed() -> None:
    files = [p for p in ATLAS_FOLDER.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 24 * MEGABYTE
    assert not [p for p in files if p.suffix in {".pt", ".bin", ".pkl", ".ckpt"}]
    text = (ATLAS_FOLDER / "ATTRIBUTION.md").read_text(encoding="utf-8")
    assert "Noto Color Emoji" in text and "Unicode" in text


def test_the_image_tokenizer_is_in_full_precision(pipe: UniDiffPipeline) -> None:
    # Half precision moves one code in eleven, and the transformer cannot read codes it was not trained on.
    assert pipe.images.dtype == torch.float32
    half = UniDiffPipeline.from_pretrained("emoji", dtype="bfloat16")
    assert half.images.dtype == torch.float32 and half.transformer.dtype == torch.bfloat16


def test_it_draws_what_is_asked(pipe: UniDiffPipeline) -> None:
    prompts = [f"a picture of {'an' if n[0] in 'aeo' else 'a'} {n} on a {b} background" for n, b in CASES]
    drawn = pipe.text_to_image(prompts, generator=0, output_type="pt").images
    readings = Oracle(get_profile("cpu")).read(drawn)
    assert [r.background for r in readings] == [b for _, b in CASES]
    right = sum([o.name for o in r.objects] == [n] for r, (n, _) in zip(readings, CASES, strict=True))
    assert right >= 3, readings


def test_it_describes_what_it_sees(pipe: UniDiffPipeline) -> None:
    scenes = [Scene((SceneObject(name, 2, 2, LARGE),), ground) for name, ground in CASES]
    images = list(render_batch(scenes, get_profile("cpu")))
    facts = [parse_caption(text) for text in pipe.caption(torch.stack(images), generator=0).texts]
    right = sum(f is not None and dict(f.counts) == s.counts for f, s in zip(facts, scenes, strict=True))
    assert right >= 3, facts
    answers = pipe.answer(torch.stack(images), ["what colour is the background?"] * len(CASES), generator=0).texts
    assert sum(a == ground for a, (_, ground) in zip(answers, CASES, strict=True)) >= 4, answers
