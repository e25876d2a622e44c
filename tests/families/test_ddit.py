"""D-DiT's pipeline: tasks, batches, the defects of the reference that are off, and folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ddit_parts import write_folder
from safetensors.torch import load_file, save_file

from unidiff import UniDiffPipeline
from unidiff.decoding import cache as policies
from unidiff.families.checkpoint.convert import convert
from unidiff.families.checkpoint.load import load_released
from unidiff.families.checkpoint.small_memory import quantise
from unidiff.families.checkpoint.verify import describe
from unidiff.families.ddit import DDIT
from unidiff.families.ddit.upstream import substituted, write_words
from unidiff.pipelines.decode import UntrainedTask

PROMPTS = ["a red fox", "two owls on blue"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("ddit")
    write_folder(place)
    return place


@pytest.fixture(scope="module")
def pipe(folder: Path) -> Any:
    made = UniDiffPipeline.from_pretrained(folder)
    made.set_progress_bar_config(disable=True)
    return made


def picture(rows: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.rand(rows, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def test_a_folder_is_found_by_its_keys(folder: Path):
    assert load_released(folder).family is DDIT
    assert describe(folder).lines()["family"] == "ddit"


def test_all_context_projections_of_the_last_block_are_taken(folder: Path):
    """Upstream's own class fails on them with current diffusers, which makes the last block without them."""
    weights = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    last = max(int(name.split(".")[1]) for name in weights if name.startswith("transformer_blocks."))
    model = load_released(folder).model
    width = model.config.num_heads * model.config.head_dim
    for kind in "qkv":
        assert weights[f"transformer_blocks.{last}.attn.add_{kind}_proj.bias"].shape == (width,)
    back = DDIT.export(model)
    assert all(torch.equal(back[name], value) for name, value in weights.items())


def test_half_precision_needs_no_autocast(folder: Path, pipe: Any):
    """Upstream's network raises there: its features of the time are float32 whatever its weights."""
    half = UniDiffPipeline.from_pretrained(folder, dtype=torch.bfloat16)
    half.set_progress_bar_config(disable=True)
    exact, near = (p.text_to_image(PROMPTS, generator=[3, 4], steps=3, output_type="pt").codes for p in (pipe, half))
    assert float((near.float() - exact).norm() / exact.norm()) < 0.1
    assert half.caption(picture(), generator=[1], steps=4).texts


def test_options_that_upstream_drops_are_refused(folder: Path, tmp_path: Path):
    """Upstream takes qk_norm and dual_attention_layers and builds another network than the config says."""
    config = json.loads((folder / "transformer" / "config.json").read_text())
    for key, value in (("qk_norm", "rms_norm"), ("dual_attention_layers", [0, 1])):
        place = tmp_path / key
        place.mkdir()
        (place / "config.json").write_text(json.dumps({**config, key: value}))
        weights = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
        save_file(weights, place / "model.safetensors")
        with pytest.raises(ValueError, match=key):
            load_released(place)


def test_pictures_do_not_depend_on_the_batch(pipe: Any):
    together = pipe.text_to_image(PROMPTS, generator=[3, 4], steps=3, output_type="pt", guidance_scale=3.0)
    for row, prompt in enumerate(PROMPTS):
        alone = pipe.text_to_image(prompt, generator=[3 + row], steps=3, output_type="pt", guidance_scale=3.0)
        torch.testing.assert_close(alone.images[0], together.images[row], atol=1e-5, rtol=0)
    assert together.nfe == 6 and tuple(together.codes.shape) == (2, 4, 4, 4)
    assert not torch.equal(together.images[0], together.images[1])


def test_without_guidance_a_step_is_one_evaluation(pipe: Any):
    assert pipe.text_to_image(PROMPTS[0], generator=0, steps=5, guidance_scale=1.0).nfe == 5


def test_negative_prompts_lead_away(pipe: Any):
    call = lambda **more: pipe.text_to_image(PROMPTS[0], generator=[1], steps=3, output_type="pt", **more).images  # noqa: E731
    assert not torch.equal(call(), call(negative_prompt="two owls"))
    assert torch.equal(call(), call(negative_prompt=""))


def test_other_sizes_take_the_centre_of_the_table(pipe: Any):
    wide = pipe.text_to_image(PROMPTS[0], generator=0, steps=2, height=4, width=12, output_type="pt")
    assert tuple(wide.images.shape) == (1, 3, 4, 12)
    with pytest.raises(ValueError, match="positions"):
        pipe.text_to_image(PROMPTS[0], generator=0, steps=2, height=8, width=14)


def test_words_do_not_depend_on_the_batch(pipe: Any):
    shown = picture(2)
    together = pipe.caption(shown, generator=[5, 6], steps=8)
    for row in range(2):
        alone = pipe.caption(shown[row], generator=[5 + row], steps=8)
        assert torch.equal(alone.ids[0], together.ids[row])
    assert together.text_ids[0] != together.text_ids[1]


def test_questions_of_other_lengths_share_a_batch(pipe: Any):
    asked = ["what?", "what is there on it?"]
    together = pipe.answer(picture(), asked, generator=[1, 2], steps=6, max_text_tokens=4)
    for row, question in enumerate(asked):
        alone = pipe.answer(picture(), question, generator=[1 + row], steps=6, max_text_tokens=4)
        assert torch.equal(alone.ids[0], together.ids[row])


@pytest.mark.parametrize("name", ["DualCache", "PrefixCache", "IntervalCache", "AdaptiveCache", "MaxLogitCache"])
def test_a_cache_that_is_refreshed_in_every_pass_is_none(pipe: Any, name: str):
    settings = {"AdaptiveCache": {"prompt_interval": 1, "response_interval": 1}}.get(name, {"interval": 1})
    plain = pipe.caption(picture(2), generator=[5, 6], steps=6)
    cached = pipe.caption(picture(2), generator=[5, 6], steps=6, policy=getattr(policies, name)(**settings))
    assert torch.equal(plain.ids, cached.ids)


def test_a_cache_saves_work(pipe: Any):
    plain = pipe.caption(picture(), generator=[5], steps=8)
    cached = pipe.caption(picture(), generator=[5], steps=8, cache="interval")
    assert 0 < cached.stats.model_tokens / cached.nfe < plain.stats.model_tokens / plain.nfe


def test_holes_in_words_beside_a_picture(pipe: Any):
    out = pipe.inpaint(picture(), text="a <mask:2> fox", generator=1)
    assert out.texts[0].startswith("a") and out.texts[0].endswith("fox")


def test_what_is_known_of_a_picture_stays(pipe: Any):
    shown, mask = picture(), torch.zeros(1, 8, 8, dtype=torch.bool)
    mask[:, :, 4:] = True
    out = pipe.inpaint(shown, mask, text=PROMPTS[0], generator=1, steps=3)
    latents = pipe.images.encode(shown)
    torch.testing.assert_close(out.codes[..., :2], latents[..., :2], atol=1e-5, rtol=0)
    assert not torch.allclose(out.codes[..., 2:], latents[..., 2:])


def test_picture_and_words_together(pipe: Any):
    """Upstream has no such task: every step of the picture unmasks a share of the words, in one evaluation."""
    with pytest.warns(UntrainedTask, match="never learned generate"):
        out = pipe.generate(num_images_per_prompt=2, generator=[1, 2], steps=4, output_type="pt", guidance_scale=1.0)
    mask = pipe.vocabulary.mask_id
    assert not (out.ids == mask).any() and out.nfe == 5  # one more with all the words for the last step
    with pytest.warns(UntrainedTask):
        alone = pipe.generate(generator=[2], steps=4, output_type="pt", guidance_scale=1.0)
    assert torch.equal(alone.ids[0], out.ids[1])
    torch.testing.assert_close(alone.images[0], out.images[1], atol=1e-5, rtol=0)


def test_a_callback_sees_the_latents_and_stops(pipe: Any):
    seen = []

    def look(pipe: Any, step: int, level: float, tensors: dict[str, torch.Tensor]) -> bool:
        seen.append((step, tuple(tensors["latents"].shape)))
        return step < 1

    out = pipe.text_to_image(PROMPTS[0], generator=0, steps=6, guidance_scale=1.0, callback_on_step_end=look)
    assert [step for step, _ in seen][:2] == [0, 1] and seen[0][1] == (1, 4, 4, 4)
    assert out.nfe == 3  # the third goes to the end


@pytest.mark.parametrize(
    ("option", "value"), [("cache", "dual"), ("threshold", 0.9), ("num_candidates", 2), ("record_trajectory", True)]
)
def test_options_that_would_do_nothing_are_refused(pipe: Any, option: str, value: Any):
    with pytest.raises(ValueError, match=option):
        pipe.text_to_image(PROMPTS[0], generator=0, steps=2, **{option: value})


def test_the_reference_way_to_write_is_a_switch(pipe: Any):
    """compat="upstream": one race in float32 for "unmask?" and "which token?", and one more evaluation at the end."""
    from dataclasses import replace

    strange = UniDiffPipeline.from_pipe(pipe, layout=replace(pipe.layout, compat="upstream"))
    ours, theirs = (p.caption(picture(), generator=[5], steps=5) for p in (pipe, strange))
    assert theirs.nfe <= 6 and theirs.nfe >= 2 and ours.nfe <= 5
    assert not (theirs.ids == pipe.vocabulary.mask_id).any()
    with pytest.raises(ValueError, match="compat"):
        replace(pipe.layout, compat="old")


def test_the_reference_uses_a_prediction_again_only_while_no_row_changed():
    """So a row costs more in a batch; the sampler here makes no pass for rows in which nothing is unmasked."""
    logits = torch.zeros(1, 3, 5)
    predict = lambda ids: substituted(logits.expand(len(ids), -1, -1), ids, 4)  # noqa: E731
    ids = torch.full((1, 3), 4)
    still = write_words(predict, ids, 4, 4, lambda step: torch.tensor([0.1, 0.1, 0.1, 0.1, 0.999]).expand(1, 3, 5))
    assert still.evaluations == [1, 1, 1, 1] and len(still.probabilities) == 2
    assert not (still.final == 4).any()


def test_float32_races_make_rare_tokens_rarer():
    """What `compat="upstream"` brings back: uniforms near 1 are rounded to 1, whose race nothing wins against."""
    from unidiff.decoding.draw import inverse_cdf

    p = torch.tensor([1 - 1e-9, 1e-9])
    assert int(inverse_cdf(p[None].double(), torch.tensor([1 - 1e-10], dtype=torch.float64))) == 1
    top = torch.nextafter(torch.ones(()), torch.zeros(()))
    race = p / (1e-10 - (torch.stack([top, top]) + 1e-10).log())
    assert int(race.argmax()) == 0


def test_converted_and_back(folder: Path, tmp_path: Path):
    convert(folder, tmp_path / "ours")
    converted = UniDiffPipeline.from_pretrained(tmp_path / "ours")
    converted.set_progress_bar_config(disable=True)
    assert converted.text_to_image(PROMPTS[0], generator=0, steps=1).codes.shape == (1, 4, 4, 4)
    convert(tmp_path / "ours", tmp_path / "back")
    name = "transformer/diffusion_pytorch_model.safetensors"
    there, back = (load_file(place / name) for place in (folder, tmp_path / "back"))
    assert there.keys() == back.keys() and all(torch.equal(there[key], back[key]) for key in there)


def test_folders_without_their_parts(folder: Path, tmp_path: Path):
    import shutil

    for part, match in (("text_encoder", "text_encoder"), ("vae", "vae"), ("tokenizer", "text tokenizer")):
        place = tmp_path / part
        shutil.copytree(folder, place, ignore=shutil.ignore_patterns(part))
        with pytest.raises(FileNotFoundError, match=match):
            UniDiffPipeline.from_pretrained(place)


def test_texts_that_are_too_long(pipe: Any):
    with pytest.raises(ValueError, match="shorten"):
        pipe.text_to_image("a red fox " * 20, generator=0, steps=1)
    with pytest.raises(ValueError, match="shorten"):
        pipe.answer(picture(), "what is it " * 20, generator=0)


def test_the_command_line(run: Any, folder: Path, tmp_path: Path):
    """Every task on a checkpoint of the golden set's size."""
    common = ("--model", folder, "--steps", 2)
    status, _, err = run("generate", "a red fox", *common, "-o", tmp_path / "fox.png")
    assert status == 0, err
    for command in (("caption", tmp_path / "fox.png"), ("answer", tmp_path / "fox.png", "what?")):
        status, out, err = run(*command, *common)
        assert status == 0, err
    status, out, _ = run("info", folder)
    assert status == 0 and "ddit" in out
    status, out, _ = run("verify", folder, "--device", "cpu")
    assert "ok   known answer" in out and "ok   a pass of this checkpoint" in out


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_weights_of_few_bits(tmp_path: Path, kind: str):
    pytest.importorskip("torchao", reason="the extra `quantise` (torchao) is not installed")
    write_folder(tmp_path / "wide", head_dim=16)  # a width that groups of 32 divide
    pipe = UniDiffPipeline.from_pretrained(tmp_path / "wide")
    pipe.set_progress_bar_config(disable=True)
    before = pipe.text_to_image(PROMPTS[0], generator=0, steps=2, output_type="pt").codes
    quantise(pipe.transformer, kind)
    after = pipe.text_to_image(PROMPTS[0], generator=0, steps=2, output_type="pt").codes
    assert 0 < float((after - before).norm() / before.norm()) < (0.05 if kind == "int8" else 0.3)
    assert pipe.caption(picture(), generator=[1], steps=4, cache="interval").texts
