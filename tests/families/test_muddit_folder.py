"""A folder in the released layout loads as one object, runs its tasks, and is refused where something is wrong."""

from __future__ import annotations

import json
import pickle
import shutil
from dataclasses import replace

import pytest
import torch
from muddit_parts import released_config, tiny_model, write_folder
from safetensors.torch import load_file, save_file

from unidiff.families.muddit import MUDDIT
from unidiff.families.muddit.folder import MASK_EMBEDDING, WEIGHTS, Muddit
from unidiff.families.muddit.scheduler import GeneratorDraws, RowDraws

SEEDS = torch.tensor([1, 2])


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
    return Muddit.from_folder(source).with_settings(steps=3, guidance_scale=2.0)


def test_parts_and_family_defaults(source, muddit):
    assert muddit.encoder.reads_masks and muddit.encoder.mask_id == 48
    assert (muddit.settings.masking, muddit.settings.time, muddit.settings.steps) == ("linear", "fraction", 3)
    assert muddit.images.factor == 2 and muddit.vocabulary.image_mask == 49 + 19
    half = Muddit.from_folder(source, dtype=torch.bfloat16)
    assert half.model.dtype == torch.bfloat16 and half.encoder.encoder.dtype == torch.bfloat16
    assert half.images.dtype == torch.float32
    assert half.with_settings(steps=2).text_to_image(["ab"], SEEDS[:1], 8, 8).isfinite().all()
    for name, value in MUDDIT.export(tiny_model()).items():
        assert torch.equal(MUDDIT.export(muddit.model)[name], value), name


def test_text_to_image_row_by_row_equals_the_batch(muddit):
    images = muddit.text_to_image(["ab", "cab"], SEEDS, 8, 12)
    assert images.shape == (2, 3, 8, 12) and images.min() >= 0 and images.max() <= 1
    alone = muddit.text_to_image(["cab"], SEEDS[1:], 8, 12)
    torch.testing.assert_close(alone[0], images[1])
    assert not torch.equal(muddit.text_to_image(["ab"], SEEDS[:1], 8, 12, negative_prompt="cab")[0], images[0])


def test_inpainting_keeps_the_known_codes(muddit, monkeypatch):
    codes = torch.full((1, 4, 4), 5)
    codes[:, :2] = 19
    decoded = []
    monkeypatch.setattr(muddit.images, "decode", lambda codes: decoded.append(codes) or torch.zeros(1, 3, 8, 8))
    muddit.text_to_image(["ab"], SEEDS[:1], 8, 8, codes=codes)
    assert (decoded[0][:, 2:] == 5).all() and decoded[0].max() < 16
    muddit.text_to_image(["ab"], SEEDS[:1], 8, 8, codes=codes, draws=RowDraws(SEEDS[1:], 16))
    assert torch.equal(decoded[1][:, 2:], decoded[0][:, 2:]) and not torch.equal(decoded[1], decoded[0])
    with pytest.raises(ValueError, match=r"codes have shape \(1, 4, 4\); expected \(1, 4, 6\)"):
        muddit.text_to_image(["ab"], SEEDS[:1], 8, 12, codes=codes)


def test_redrawing_and_inpainting_images(muddit, monkeypatch):
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    codes = muddit.images.encode(images)
    changed = muddit.redraw(images, ["ab", "cab"], SEEDS, strength=0.7)
    assert changed.shape == images.shape
    torch.testing.assert_close(muddit.redraw(images[1:], ["cab"], SEEDS[1:], strength=0.7)[0], changed[1])
    decoded = []
    monkeypatch.setattr(muddit.images, "decode", lambda codes: decoded.append(codes) or torch.zeros(2, 3, 8, 8))
    mask = torch.zeros(2, 8, 8)
    mask[:, :3] = 1.0  # the second row of cells is touched
    muddit.redraw(images, ["ab", "cab"], SEEDS, 1.0, mask)
    assert torch.equal(decoded[0][:, 2:], codes[:, 2:]) and not torch.equal(decoded[0][:, :2], codes[:, :2])
    with pytest.raises(ValueError, match=r"mask has shape \(1, 8, 8\); expected \(2, 8, 8\)"):
        muddit.redraw(images, ["ab", "cab"], SEEDS, 1.0, mask[:1])
    with pytest.raises(ValueError, match="1 prompts for 2 images"):
        muddit.redraw(images, ["ab"], SEEDS)


def test_answers_and_captions(muddit):
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    answers = muddit.answer(images, SEEDS, ["ab", "cab"])
    assert len(answers) == 2 and all(isinstance(a, str) for a in answers)
    assert muddit.answer(images[1:], SEEDS[1:], ["cab"]) == answers[1:]
    assert len(muddit.answer(images, SEEDS)) == 2
    compat = replace(muddit.settings, compat="upstream")
    draws = GeneratorDraws(torch.Generator().manual_seed(0))
    assert len(muddit.answer(images, SEEDS, ["ab", "cab"], compat, draws)) == 2


def test_texts_and_sizes_that_do_not_fit_are_refused(muddit):
    image = torch.rand(1, 3, 8, 8)
    with pytest.raises(ValueError, match="leaves no room for an answer in 10"):
        muddit.answer(image, SEEDS[:1], ["abcdefghij"])
    with pytest.raises(ValueError, match="1 questions for 2 images"):
        muddit.answer(image.expand(2, -1, -1, -1), SEEDS, ["ab"])
    with pytest.raises(ValueError, match="a prompt has 12 tokens, start and end included; the encoder reads 10"):
        muddit.text_to_image(["abcdefghij"], SEEDS[:1], 8, 8)
    compat = replace(muddit.settings, compat="upstream")
    assert (
        len(muddit.text_to_image(["abcdefghij"], SEEDS[:1], 8, 8, settings=compat)) == 1
    )  # cut, as the reference does
    with pytest.raises(ValueError, match="8x10 must be a positive multiple of 4"):
        muddit.text_to_image(["ab"], SEEDS[:1], 8, 10)


def test_meissonic_draws_but_does_not_write(folder):
    model = tiny_model(text_vocab_size=None)
    config = {k: v for k, v in released_config(model).items() if k not in ("t5_dim", "tokenizer_vocab_size")}
    (folder / "transformer" / "config.json").write_text(json.dumps({**config, "_class_name": "Transformer2DModel"}))
    save_file(MUDDIT.export(model), folder / "transformer" / WEIGHTS)
    (folder.parent / MASK_EMBEDDING).unlink()
    meissonic = Muddit.from_folder(folder).with_settings(steps=2)
    assert meissonic.settings.time == "index"
    assert meissonic.text_to_image(["ab"], SEEDS[:1], 8, 8).shape == (1, 3, 8, 8)
    with pytest.raises(ValueError, match="no mask embedding was given"):
        meissonic.answer(torch.rand(1, 3, 8, 8), SEEDS[:1])


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
    back = MUDDIT.export(Muddit.from_folder(folder).model)
    assert set(back) == set(weights) and all(torch.equal(back[k], v) for k, v in weights.items())
    (folder / "transformer" / "b.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"b.safetensors does not exist; download the whole checkpoint"):
        Muddit.from_folder(folder)


def test_damaged_folders_are_refused(folder):
    encoder = folder / "text_encoder" / "model.safetensors"
    weights = load_file(encoder)
    weights.pop("text_projection.weight")
    save_file(weights, encoder, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 missing \(text_projection.weight\)"):
        Muddit.from_folder(folder)
    raw = (folder / "transformer" / WEIGHTS).read_bytes()
    (folder / "transformer" / WEIGHTS).write_bytes(raw[:100])
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        Muddit.from_folder(folder)
    (folder / "transformer" / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json' cannot be read as a JSON config"):
        Muddit.from_folder(folder)
    shutil.rmtree(folder / "vqvae")
    with pytest.raises(FileNotFoundError, match="has no vqvae; name a Muddit or Meissonic folder"):
        Muddit.from_folder(folder)


def test_bad_mask_embeddings_are_refused(source, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.pth does not exist"):
        Muddit.from_folder(source, mask_embedding=tmp_path / "nowhere.pth")
    path = tmp_path / "row.pth"
    torch.save({"row": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="holds a dict; expected one tensor"):
        Muddit.from_folder(source, mask_embedding=path)
    path.write_bytes(pickle.dumps(print, protocol=2))  # a pickle that would run code
    with pytest.raises(ValueError, match="damaged, or holds more than tensors"):
        Muddit.from_folder(source, mask_embedding=path)
