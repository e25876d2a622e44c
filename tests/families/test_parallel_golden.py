"""MMaDA-Parallel, models A and M, against every tensor of their golden set: the one sampler with recorded draws."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from golden import golden_cases
from parallel_sets import LOGITS, is_a, load, logits_of, settings_of
from PIL import Image
from reference.batches import llada_batch
from released_pipelines import write_model
from safetensors.torch import load_file
from typer.testing import CliRunner

from unidiff.cli.app import app
from unidiff.families.checkpoint.convert import convert
from unidiff.families.lumina import LUMINA, LuminaLayout, lumina_grid
from unidiff.families.mmada import MMADA, MMaDALayout, mmada_vocabulary

pytestmark = pytest.mark.golden


@pytest.mark.parametrize("folder", golden_cases("mmada_parallel", having="weights.safetensors"))
def test_every_weight_maps_both_ways(folder):
    family, stored = (LUMINA if is_a(folder) else MMADA), load_file(folder / "weights.safetensors")
    back = family.export(load(folder)[0])
    assert set(back) == set(stored)
    assert all(torch.equal(back[name], value) for name, value in stored.items())


@pytest.mark.parametrize("folder", golden_cases("mmada_parallel", having="weights.safetensors"))
def test_ids_and_settings_of_the_released_models(folder):
    stored = settings_of(folder)["released_reference"]
    if not is_a(folder):
        vocabulary, defaults = mmada_vocabulary(), stored["defaults"]
        marks = {name.strip("<|>[]").lower(): i for name, i in stored["reserved"].items()}
        assert marks.items() <= dict(vocabulary.specials).items()
        assert {name: stored[name] for name in ("bos", "eos")}.items() <= dict(vocabulary.specials).items()
        assert vocabulary.image[0] == vocabulary.text[1] == stored["text_tokenizer_len"]
        layout = MMaDALayout(vocabulary, str.split)
        assert layout.side**2 == stored["num_vq_tokens"] and layout.words_beside["edit"] + 1 == stored["text_length"]
        joint = layout.joint
        assert (joint.steps, joint.image_steps) == (defaults["text_steps"], defaults["image_steps"])
        assert (joint.temperature, joint.text_temperature) == (
            defaults["image_temperature"],
            defaults["text_temperature"],
        )
        # as in the training's own pictures: the script that has others for words guides them the wrong way
        training = stored["defaults_during_training_validation"]
        assert (joint.guidance, joint.text_guidance) == (training["image_cfg"], training["text_cfg"])
        return
    vocabulary, defaults = LUMINA.vocabulary({}), stored["defaults_readme"]
    names = {"newline": "newline", "boi": "boi", "eoi": "eoi", "uncondition": "uncondition", "answer_pad": "padding"}
    names |= {"answer": "answer_start", "end_answer": "answer_end"}
    assert {name: stored[theirs] for name, theirs in names.items()}.items() <= dict(vocabulary.specials).items()
    assert vocabulary.image[0] == stored["image_offset"] and vocabulary.mask_id == stored["mask"]
    layout = LuminaLayout(vocabulary, str.split)
    joint = layout.joint
    assert (joint.steps, joint.image_steps) == (defaults["text_steps"], defaults["timesteps"])
    assert (joint.guidance, joint.image_guidance) == (defaults["cfg_scale"], defaults["cfg_img"])
    assert (joint.temperature, joint.text_temperature) == (defaults["temperature"], defaults["text_temperature"])
    assert layout.words_beside["generate"] == defaults["text_gen_length"]


@pytest.mark.parametrize("folder", golden_cases("mmada_parallel", having="forward.safetensors"))
@torch.no_grad()
def test_forward(folder):
    """A short row in a batch is as alone."""
    model, stored = load(folder)[0], load_file(folder / "forward.safetensors")
    ids = stored["input_ids"].long()
    torch.testing.assert_close(logits_of(model, ids), stored["logits"], **LOGITS)
    alone = stored["short_alone_logits"]
    n = alone.shape[1]
    torch.testing.assert_close(logits_of(model, ids[:1, :n]), alone, **LOGITS)
    valid = torch.arange(ids.shape[1]) < torch.tensor([[n], [ids.shape[1]]])
    together = model(llada_batch(ids, torch.ones_like(valid), valid))
    torch.testing.assert_close(together[:1, :n], alone, **LOGITS)
    assert (stored["short_in_batch_logits"] - alone).abs().max() > 10 * LOGITS["atol"]  # the reference sees its padding


@pytest.mark.parametrize("folder", golden_cases("mmada_parallel", having="paint_masks.safetensors"))
def test_crops_and_masks(folder):
    """Sizes of pictures, and the cells that a centred rectangle changes: those that it covers by half or more are among ours."""
    config, stored = settings_of(folder), load_file(folder / "paint_masks.safetensors")
    for rule in config["crop_rule"]:
        width, height = rule["image_wh"]
        rows, columns = lumina_grid(height, width, 512)
        assert [rows, columns] == rule["token_grid_hw"] and [columns * 16, rows * 16] == rule["crop_wh"]
        assert rule["crop_wh"] in config["crop_sizes_wh"]
    for case in config["paint_masks"]:
        width, height = case["image_wh"]
        high, wide = round(height * case["mask_h_ratio"]), round(width * case["mask_w_ratio"])
        top, left = (height - high) // 2, (width - wide) // 2
        white = torch.zeros(height, width)
        white[top : top + high, left : left + wide] = 1
        if case["mode"] == "outpainting":
            white = 1 - white
        cells = white.view(height // 16, 16, width // 16, 16).transpose(1, 2).flatten(2).mean(-1)
        expected = stored[case["name"]].bool()
        assert torch.equal(cells > 0.5, expected)
        assert not (expected & ~(cells > 0)).any()  # a code is redrawn here where any of its pixels is white


# ------------------------------------------------------------------------------------------------------- the command line


def words_tokenizer(folder: Path) -> None:
    """A few words, whatever the text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    known = {word: i for i, word in enumerate(("[unk]", "a", "red", "fox", "make", "it"))}
    backend = Tokenizer(models.WordLevel(known, unk_token="[unk]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[unk]").save_pretrained(folder)


@pytest.mark.parametrize("folder", golden_cases("mmada_parallel", having="weights.safetensors"))
def test_the_command_line_edits_and_answers(folder, tmp_path):
    """The set's weights as a folder with tokenizers of their sizes: 2 x 2 pixels are a code."""
    config, (_, vocabulary) = settings_of(folder), load(folder)
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    own = {"architectures": ["LLaDAForMultiModalGeneration"]}
    if not is_a(folder):
        own = {"new_vocab_size": vocabulary.size, "num_vq_tokens": 9}
        vocabulary = replace(vocabulary, specials={"start_header": 1, "end_header": 2, "eot": 3, **vocabulary.specials})
    else:
        vocabulary = replace(vocabulary, specials={"eos": 1, **vocabulary.specials})
    theirs.mkdir()
    (theirs / "config.json").write_text(json.dumps({**config["model"], **own}))
    shutil.copy(folder / "weights.safetensors", theirs / "model.safetensors")
    convert(theirs, ours, vocabulary=vocabulary)
    write_model(ours / "image_tokenizer", "vq_model", num_vq_embeddings=vocabulary.image_size)
    words_tokenizer(ours / "tokenizer")
    Image.new("RGB", (6, 6), (200, 30, 40)).save(tmp_path / "picture.png")
    common = ["--max-text-tokens", "5", "--model", str(ours), "--device", "cpu", "--steps", "4", "--seed", "3"]
    lines = [["edit", str(tmp_path / "picture.png"), "make it red", "-o", str(tmp_path / "red.png")]]
    if not is_a(folder):  # A draws 1,024 pixels where nothing else is said
        lines.append(["generate", "a red fox", "-o", str(tmp_path / "fox.png"), "--cache", "interval"])
    for line in lines:
        done = CliRunner().invoke(app, [*line, *common])
        assert done.exit_code == 0, done.output
        assert Image.open(line[line.index("-o") + 1]).size == (6, 6) and ".png: " in done.stdout
    told = CliRunner().invoke(app, ["info", str(ours)])
    assert told.exit_code == 0 and ("lumina" if is_a(folder) else "mmada") in told.stdout
    checked = CliRunner().invoke(app, ["verify", str(ours)])
    assert all(f"ok   {what}" in checked.stdout for what in ("weights", "known answer", "a pass of this checkpoint"))
    assert "FAIL published settings" in checked.stdout  # those of 8 billion parameters
    back = convert(ours, tmp_path / "back")
    assert back.endswith("in the released layout")
    again, stored = (
        load_file(path) for path in (tmp_path / "back" / "model.safetensors", theirs / "model.safetensors")
    )
    assert set(again) == set(stored) and all(torch.equal(again[name], stored[name]) for name in stored)
