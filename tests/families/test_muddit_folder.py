"""A folder in the released layout is a pipeline that does its tasks, and is refused where something is wrong."""

from __future__ import annotations

import json
import pickle
import shutil
from dataclasses import replace

import pytest
import torch
from muddit_parts import WEIGHTS, released_config, tiny_model, write_folder
from safetensors.torch import load_file, save_file

from unidiff.families.muddit import MUDDIT
from unidiff.families.muddit.denoiser import MASK_EMBEDDING, ClipText, MudditConditions
from unidiff.pipeline import UniDiffPipeline

SEEDS = [1, 2]
IMAGES = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("muddit") / "512"
    write_folder(folder)
    return folder


@pytest.fixture
def folder(source, tmp_path):
    """A copy that a test may damage."""
    shutil.copytree(source.parent, tmp_path / "all")
    return tmp_path / "all" / "512"


@pytest.fixture(scope="module")
def muddit(source):
    return load(source)


def load(folder, **more) -> UniDiffPipeline:
    pipe = UniDiffPipeline.from_pretrained(folder, **more).sized(8, 8)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_parts_and_family_defaults(source, muddit):
    layout = muddit.layout
    assert (
        layout.encoder.reads_masks
        and layout.encoder.mask_id == 48
        and layout.tasks
        == (
            "text_to_image",
            "caption",
            "answer",
            "inpaint",
        )
    )
    assert (layout.config.image.schedule, layout.config.image.steps) == ("linear", 48)
    assert layout.told == MudditConditions("fraction") and layout.usual == (32, 32)
    assert muddit.images.factor == 2 and muddit.vocabulary.image_mask == 49 + 19
    half = load(source, dtype=torch.bfloat16)
    assert half.transformer.dtype == torch.bfloat16 and half.text_encoder.dtype == torch.bfloat16
    assert half.image_tokenizer.dtype == torch.float32
    assert half.text_to_image("ab", steps=2, output_type="pt").images.isfinite().all()
    for name, value in MUDDIT.export(tiny_model()).items():
        assert torch.equal(MUDDIT.export(muddit.transformer)[name], value), name
    muddit.to(torch.float64)
    assert muddit.text_encoder.dtype == torch.float64
    muddit.to(torch.float32)


def test_text_to_image_row_by_row_equals_the_batch(muddit):
    draw = lambda prompt, seeds, **more: muddit.text_to_image(  # noqa: E731
        prompt, generator=seeds, steps=3, guidance_scale=2.0, output_type="pt", **more
    )
    both = draw(["ab", "cab"], SEEDS, height=8, width=12)
    assert both.images.shape == (2, 3, 8, 12) and both.images.min() >= 0 and both.images.max() <= 1
    alone = draw("cab", SEEDS[1:], height=8, width=12)
    torch.testing.assert_close(alone.images[0], both.images[1])
    led, plain = draw(["ab"], [1], negative_prompt="cab"), draw(["ab"], [1])
    assert not torch.equal(led.confidences, plain.confidences)
    mixed = draw(["ab", "ab"], [1, 1], negative_prompt=["cab", ""])  # rows with other words to be led away from
    torch.testing.assert_close(mixed.confidences, torch.cat((led.confidences, plain.confidences)))


@pytest.mark.parametrize("cache", ["interval", "max-logit", "adaptive"])
def test_caches_save_work(muddit, cache):
    plain, cached = (
        muddit.text_to_image("ab", generator=1, steps=6, cache=name, output_type="codes") for name in (None, cache)
    )
    assert cached.stats.partial_passes and cached.stats.linear_flops < 0.9 * plain.stats.linear_flops
    assert cached.nfe == plain.nfe and cached.cache.policy == cache


def test_inpainting_keeps_the_known_codes(muddit):
    codes, mask = muddit.images.encode(IMAGES), torch.zeros(8, 8, dtype=torch.bool)
    mask[:3] = True  # the second row of cells is touched
    paint = lambda **more: muddit.inpaint(  # noqa: E731
        IMAGES, mask.numpy(), ["ab", "cab"], steps=3, guidance_scale=2.0, output_type="codes", **more
    )
    first, second = paint(generator=SEEDS), paint(generator=[3, 4])
    for out in (first, second):
        assert torch.equal(out.codes[:, 2:], codes[:, 2:]) and not torch.equal(out.codes[:, :2], codes[:, :2])
    assert not torch.equal(first.codes, second.codes) and first.texts == ["ab", "cab"]
    words = muddit.inpaint(IMAGES[:1], mask.numpy(), "a <mask> b", generator=1, steps=3, output_type="codes")
    assert torch.equal(words.codes[:, 2:], codes[:1, 2:]) and "<mask>" not in words.texts[0]
    with pytest.raises(ValueError, match="strength is for pictures whose words are known"):
        muddit.inpaint(IMAGES[:1], mask.numpy(), "a <mask>", strength=0.5)


def test_redrawing_starts_in_the_middle(muddit):
    """Without a mask the whole picture may change; a coin for each code says whether it does."""
    wide, codes = muddit.sized(40, 40), torch.randint(16, (3, 20, 20), generator=torch.Generator().manual_seed(0))
    wide.set_progress_bar_config(disable=True)
    pixels = wide.images.decode(codes)
    codes = wide.images.encode(pixels)
    seen: list[torch.Tensor] = []
    look = lambda pipe, step, t, tensors: seen.append(tensors["open"].sum(1))  # noqa: E731
    redraw = lambda pictures, seeds, **more: wide.inpaint(  # noqa: E731
        pictures, text="ab", generator=seeds, steps=8, guidance_scale=1.0, output_type="codes", **more
    )
    out = redraw(pixels, [1, 2, 3], strength=0.5, callback_on_step_end=look)
    assert out.nfe == len(seen) == 4
    hidden = (out.confidences != 1).sum(1)
    assert bool(((hidden / 400 - 0.5).abs() < 0.1).all()), "half of the codes at half the steps of a linear schedule"
    for passes, left in enumerate(seen, 1):  # the rest of the schedule, from there
        assert torch.equal(left, hidden * (4 - passes) // 4)
    assert torch.equal(redraw(pixels[1:2], [2], strength=0.5).codes[0], out.codes[1])
    assert int((redraw(pixels, [1, 2, 3], strength=0.25).codes != codes).sum()) < int((out.codes != codes).sum())
    for strength in (0.0, 0.1, 1.5, float("nan"), "x"):
        with pytest.raises(ValueError, match="strength"):
            redraw(pixels[:1], [1], strength=strength)


def test_answers_and_captions(muddit):
    answers = muddit.answer(IMAGES, ["ab", "cab"], generator=SEEDS, steps=3)
    assert len(answers.texts) == 2 and all(isinstance(a, str) for a in answers.texts)
    assert muddit.answer(IMAGES[1:], "cab", generator=SEEDS[1:], steps=3).texts == answers.texts[1:]
    captions = muddit.caption(IMAGES, generator=SEEDS, steps=3)
    assert len(captions.texts) == 2 and captions.nfe == 3, "text is not guided"
    short = muddit.caption(IMAGES, generator=SEEDS, steps=3, max_text_tokens=2)
    assert all(len(ids) <= 2 for ids in short.text_ids)


def test_the_references_commit_rule_is_asked_for_by_name(muddit):
    upstream = muddit.from_pipe(muddit, layout=replace(muddit.layout, compat="upstream"))
    upstream.set_progress_bar_config(disable=True)
    ours, theirs = (
        pipe.text_to_image(["ab", "cab"], generator=SEEDS, steps=4, output_type="codes") for pipe in (muddit, upstream)
    )
    assert ours.nfe == theirs.nfe == 8 and not torch.equal(ours.codes, theirs.codes)
    with pytest.raises(ValueError, match="compat = 'old'"):
        replace(muddit.layout, compat="old")


def test_texts_and_sizes_that_do_not_fit_are_refused(muddit):
    with pytest.raises(ValueError, match="leaves no room for an answer in 10; shorten it to 9"):
        muddit.answer(IMAGES[:1], "abcdefghij")
    with pytest.raises(ValueError, match="a prompt has 12 tokens, start and end included; the encoder reads 10"):
        muddit.text_to_image("abcdefghij")
    with pytest.raises(ValueError, match="4x5 codes cannot be halved; use even sides"):
        muddit.text_to_image("ab", height=8, width=10)
    with pytest.raises(ValueError, match="muddit cannot do 'generate'"):
        muddit.generate()


def test_meissonic_draws_but_does_not_write(folder):
    model = tiny_model(text_vocab_size=None)
    config = {k: v for k, v in released_config(model).items() if k not in ("t5_dim", "tokenizer_vocab_size")}
    (folder / "transformer" / "config.json").write_text(json.dumps({**config, "_class_name": "Transformer2DModel"}))
    save_file(MUDDIT.export(model), folder / "transformer" / WEIGHTS)
    meissonic = load(folder)
    assert meissonic.layout.told.time == "index" and meissonic.layout.tasks == ("text_to_image", "inpaint")
    assert meissonic.text_to_image("ab", steps=2, output_type="pt").images.shape == (1, 3, 8, 8)
    with pytest.raises(ValueError, match="meissonic cannot do 'caption'"):
        meissonic.caption(IMAGES[:1])
    with pytest.raises(ValueError, match="meissonic reads words and writes none"):
        meissonic.inpaint(IMAGES[:1], text="a <mask>")


def test_without_a_mask_embedding_nothing_is_written(folder):
    (folder.parent / MASK_EMBEDDING).unlink()
    muddit = load(folder)
    assert muddit.text_to_image("ab", steps=2, output_type="codes").codes.max() < 16
    for call in (lambda: muddit.caption(IMAGES[:1]), lambda: muddit.inpaint(IMAGES[:1], text="a <mask>")):
        with pytest.raises(ValueError, match=r"there is no mask embedding; put mask_token_embedding.pth"):
            call()


def test_sharded_weights_load(folder):
    path = folder / "transformer" / WEIGHTS
    weights = load_file(path)
    names = sorted(weights)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, keys in parts.items():
        save_file({k: weights[k] for k in keys}, folder / "transformer" / file)
    index = {"weight_map": {k: file for file, keys in parts.items() for k in keys}}
    (folder / "transformer" / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    path.unlink()
    back = MUDDIT.export(load(folder).transformer)
    assert set(back) == set(weights) and all(torch.equal(back[k], v) for k, v in weights.items())
    (folder / "transformer" / "b.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"b.safetensors does not exist; download the whole checkpoint"):
        load(folder)


def test_damaged_folders_are_refused(folder):
    encoder = folder / "text_encoder" / "model.safetensors"
    weights = load_file(encoder)
    weights.pop("text_projection.weight")
    save_file(weights, encoder, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 missing \(text_projection.weight\)"):
        load(folder)
    shutil.rmtree(folder / "text_encoder")
    with pytest.raises(FileNotFoundError, match="has no text_encoder; name a Muddit or Meissonic folder"):
        load(folder)
    raw = (folder / "transformer" / WEIGHTS).read_bytes()
    (folder / "transformer" / WEIGHTS).write_bytes(raw[:100])
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        load(folder)
    (folder / "transformer" / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json' cannot be read as a JSON config"):
        load(folder)


def test_other_schedules_and_absent_parts_are_refused(folder):
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({"masking_schedule": "square"}))
    with pytest.raises(ValueError, match=r"masking_schedule is 'square'; expected one of \['cosine', 'linear'\]"):
        load(folder)
    shutil.rmtree(folder / "scheduler")
    assert load(folder).layout.config.image.schedule == "cosine"
    shutil.rmtree(folder / "vqvae")
    with pytest.raises(FileNotFoundError, match="has no image tokenizer"):
        load(folder)


def test_bad_mask_embeddings_are_refused(folder):
    path = folder / MASK_EMBEDDING
    torch.save({"row": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="holds a dict; expected one tensor"):
        ClipText.from_folder(folder)
    path.write_bytes(pickle.dumps(print, protocol=2))  # a pickle that would run code
    with pytest.raises(ValueError, match="damaged, or holds more than tensors"):
        ClipText.from_folder(folder)
