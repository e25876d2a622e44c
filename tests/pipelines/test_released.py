"""`UniDiffPipeline.from_pretrained` on released folders: UniDisc with its tokenizers, Muddit with its own tasks."""

from __future__ import annotations

import shutil

import pytest
import torch
from muddit_parts import write_folder
from PIL import Image
from released_parts import write_tiny
from released_pipelines import write_unidisc
from safetensors.torch import save_file
from typer.testing import CliRunner

from unidiff.cli import app
from unidiff.families.checkpoint.convert import convert
from unidiff.pipeline import UniDiffPipeline
from unidiff.pipelines.released import is_released
from unidiff.tokens.text import TextTokenizer


@pytest.fixture(scope="module")
def unidisc(tmp_path_factory):
    """UniDisc beside LlamaGen's tokenizer (factor 2, 12 codes) and a text tokenizer: 3 x 3 codes, 6 x 6 pixels."""
    folder = tmp_path_factory.mktemp("unidisc")
    write_unidisc(folder)
    return folder


@pytest.fixture(scope="module")
def pipe(unidisc):
    return UniDiffPipeline.from_pretrained(unidisc)


def test_unidisc_does_its_tasks_with_the_same_calls(pipe):
    assert type(pipe) is UniDiffPipeline and pipe.image_size == (6, 6)
    drawn = pipe.text_to_image(["a fox", "owls"], 2, generator=5, steps=3, guidance_scale=2.0)
    assert [i.size for i in drawn.images] == [(6, 6)] * 4 and drawn.texts == ["a fox", "a fox", "owls", "owls"]
    assert drawn.codes.shape == (4, 3, 3) and drawn.codes.max() < 12 and 3 < drawn.nfe <= 6
    alone = pipe.text_to_image(
        "owls", generator=[int(drawn.seeds[3])], steps=3, guidance_scale=2.0, output_type="codes"
    )
    assert torch.equal(alone.images[0], drawn.codes[3])
    told = pipe.caption(drawn.images, 5, generator=1, steps=3)
    assert len(told.texts) == 4 and max(map(len, told.text_ids)) <= 5
    assert [i.tobytes() for i in told.images] == [i.tobytes() for i in drawn.images]
    both = pipe.generate(num_images_per_prompt=2, max_text_tokens=4, generator=1, steps=3)
    assert len(both.images) == len(both.texts) == 2
    begun = pipe.generate("a <mask> fox", num_images_per_prompt=2, generator=1, steps=3)
    assert len(begun.images) == 2 and all(ids[-1:] == pipe.texts.encode("fox")[-1:] for ids in begun.text_ids)


def test_unidisc_fills_holes_in_both_and_keeps_the_rest(pipe):
    picture = Image.new("RGB", (6, 6), (200, 30, 40))
    mask = Image.new("L", (6, 6), 0)
    mask.paste(255, (0, 0, 2, 6))
    filled = pipe.inpaint(picture, mask, "a <mask:2> fox", generator=3, steps=3)
    codes = pipe.images.encode(pipe.image_inputs.images(picture))[0]
    assert torch.equal(filled.codes[0][:, 1:], codes[:, 1:])
    words = pipe.texts.encode("a"), pipe.texts.encode("fox")
    assert filled.text_ids[0][: len(words[0])] == words[0] and filled.text_ids[0][-len(words[1]) :] == words[1]
    assert len(filled.text_ids[0]) == len(words[0]) + 2 + len(words[1])
    with pytest.raises(ValueError, match="known in full"):
        pipe.inpaint(picture, None, "a fox")
    with pytest.raises(TypeError, match="stpes"):
        pipe.text_to_image("a fox", stpes=3)


def test_a_threshold_means_the_same_in_every_row(pipe):
    """Captions with and without holes in one call: the threshold is that of text, whatever the rows hide."""
    picture, seeds = Image.new("RGB", (6, 6), (200, 30, 40)), [3, 4, 5, 6]
    mask = Image.new("L", (6, 6), 255)
    texts = ["a <mask:2> fox", "a fox", "<mask> owls", "two owls"]
    options = dict(threshold=0.0, steps=6, output_type="codes")
    together = pipe.inpaint(picture, mask, texts, generator=seeds, **options)
    for row, (text, seed) in enumerate(zip(texts, seeds, strict=True)):
        alone = pipe.inpaint(picture, mask, text, generator=[seed], **options)
        assert torch.equal(alone.ids[0], together.ids[row])
    once = pipe.text_to_image("a fox", generator=[4], threshold=0.0, steps=6)
    assert (
        once.nfe < pipe.text_to_image("a fox", generator=[4], steps=6).nfe
    )  # of pictures, where nothing else is decoded


def test_a_converted_unidisc_folder_runs_the_same(unidisc, pipe, tmp_path):
    convert(unidisc, tmp_path / "ours")
    other = UniDiffPipeline.from_pretrained(
        tmp_path / "ours",
        "float32",
        image_tokenizer=unidisc / "image_tokenizer",
        text_tokenizer=unidisc / "text_tokenizer",
    )
    options = {"generator": 5, "steps": 3, "output_type": "codes"}
    assert torch.equal(other.text_to_image("a fox", **options).codes, pipe.text_to_image("a fox", **options).codes)
    half = UniDiffPipeline.from_pretrained(unidisc, dtype="bfloat16")
    assert half.transformer.dtype == torch.bfloat16 and half.images.dtype == torch.float32


def test_parts_that_are_missing_or_of_another_model(unidisc, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(unidisc, copy)
    shutil.rmtree(copy / "text_tokenizer")
    with pytest.raises(FileNotFoundError, match="has no text tokenizer"):
        UniDiffPipeline.from_pretrained(copy)
    shutil.rmtree(copy / "image_tokenizer")
    with pytest.raises(FileNotFoundError, match=r"has no image tokenizer; put it into"):
        UniDiffPipeline.from_pretrained(copy)
    write_tiny(copy / "vqvae", "vq_model")
    with pytest.raises(ValueError, match="the image tokenizer has 16 codes, but the model 12"):
        UniDiffPipeline.from_pretrained(copy, text_tokenizer=unidisc / "text_tokenizer")
    shutil.rmtree(copy / "vqvae")
    TextTokenizer.train(["a"], 260).save_pretrained(copy / "text_tokenizer")
    with pytest.raises(ValueError, match=r"the text tokenizer has 260 ids, but the model"):
        UniDiffPipeline.from_pretrained(copy, image_tokenizer=unidisc / "image_tokenizer")
    write_tiny(tmp_path / "mdlm", "mdlm")
    assert is_released(tmp_path / "mdlm")
    with pytest.raises(FileNotFoundError, match="has no text tokenizer"):
        UniDiffPipeline.from_pretrained(tmp_path / "mdlm")
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    assert not is_released(tmp_path)


def test_the_command_line_draws_and_describes_with_a_released_model(unidisc, tmp_path):
    common = ["--model", str(unidisc), "--device", "cpu", "--steps", "2"]
    drawn = CliRunner().invoke(app, ["generate", "a fox", "--out", str(tmp_path / "fox.png"), *common])
    assert drawn.exit_code == 0, drawn.output
    assert Image.open(tmp_path / "fox.png").size == (6, 6)
    told = CliRunner().invoke(app, ["caption", str(tmp_path / "fox.png"), "--max-text-tokens", "4", *common])
    assert told.exit_code == 0, told.output


@pytest.fixture(scope="module")
def muddit(tmp_path_factory):
    folder = tmp_path_factory.mktemp("muddit") / "512"
    write_folder(folder)
    return folder


def test_muddit_does_its_tasks_and_its_converted_folder_the_same(muddit, tmp_path):
    convert(muddit, tmp_path / "ours")
    shutil.copy(muddit.parent / "mask_token_embedding.pth", tmp_path)
    pipes = [UniDiffPipeline.from_pretrained(f) for f in (muddit, tmp_path / "ours")]
    results = []
    for pipe in pipes:
        pipe = pipe.sized(8, 8)
        drawn = pipe.text_to_image(["a", "b"], generator=3, steps=2, guidance_scale=2.0, output_type="pt")
        assert drawn.images.shape == (2, 3, 8, 8) and drawn.texts == ["a", "b"]
        told = pipe.caption(drawn.images, generator=1, steps=2)
        answered = pipe.answer(drawn.images[:1], ["a", "b"], generator=1, steps=2)
        assert len(told.texts) == len(answered.texts) == len(told.images) == 2
        mask = torch.zeros(8, 8, dtype=torch.bool)
        mask[:4] = True
        painted = pipe.inpaint(drawn.images[:1], mask.numpy(), "c", generator=1, steps=2, output_type="pt")
        assert painted.images.shape == (1, 3, 8, 8)
        results.append((drawn.images, told.texts, painted.images))
        assert drawn.nfe == 4 and drawn.stats.model_tokens and drawn.ids.shape == (2, 26)
        assert torch.equal(drawn.images, pipe.images.decode(drawn.codes))
    assert torch.equal(results[0][0], results[1][0]) and results[0][1] == results[1][1]
    assert torch.equal(results[0][2], results[1][2])
    back = convert(tmp_path / "ours", tmp_path / "back")
    assert back.endswith("muddit in the released layout")
    assert {p.name for p in (tmp_path / "back").iterdir()} == {p.name for p in muddit.iterdir()}
    with pytest.raises(ValueError, match="muddit cannot do 'generate'; it does text_to_image"):
        pipe.generate(2)
    with pytest.raises(TypeError, match="has no argument 'stpes'; did you mean 'steps'"):
        pipe.text_to_image("a", stpes=3)


def test_the_command_line_takes_muddit_and_says_what_it_lacks(run, muddit, tmp_path):
    common = ("--model", muddit, "--steps", 1)
    status, out, _ = run("generate", "a", "-n", 2, "-o", tmp_path / "a.png", "--negative", "b", *common)
    assert status == 0 and len(out.splitlines()) == 2
    picture = tmp_path / "a-1.png"
    Image.new("L", Image.open(picture).size, 255).save(tmp_path / "mask.png")
    assert run("caption", picture, *common)[0] == run("answer", picture, "b", *common)[0] == 0
    inpaint = ("inpaint", picture, "--mask", tmp_path / "mask.png", "-o", tmp_path / "b.png", *common)
    assert run(*inpaint)[0] == 0
    for flag in (("--candidates", 2), ("--cache", "interval"), ("--gif", tmp_path / "x.gif")):
        assert run("generate", "a", "-o", tmp_path / "d.png", *flag, *common)[0] == 0
    for command in (("demo", "--model", muddit), ("profile-cache", muddit), ("eval", "emoji", "--model", muddit)):
        status, _, error = run(*command)
        assert status == 1 and "takes unidiff's own models" in error
    assert not (tmp_path / "c.png").exists()


def test_unidisc_answers_no_questions(pipe):
    with pytest.raises(ValueError, match="unidisc cannot do 'answer'"):
        pipe.answer(Image.new("RGB", (6, 6)), "what is it?")
