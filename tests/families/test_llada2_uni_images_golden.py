"""The image parts of LLaDA2.0-Uni against the reference: patches, features and codes of both merge sizes, features of codes, and
the sampler of the pixel decoder with its guidance. Every stored tensor is compared.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers.schedulers.scheduling_flow_match_euler_discrete as diffusers_scheduler
import pytest
import torch
from golden import golden_cases
from golden_pipelines import write_golden_pipeline
from released_parts import golden_checkpoints
from safetensors.torch import load_file
from siglip_parts import write_decoder, write_tokenizer
from torch import Tensor

from unidiff.families.checkpoint.convert import convert
from unidiff.families.checkpoint.load import load_released
from unidiff.families.family import Released
from unidiff.families.siglip_vq import SIGLIP_VQ, load_features
from unidiff.pipeline import UniDiffPipeline
from unidiff.tokens.image.flow import TURBO, FlowSettings, doubled, flow_states, guided_velocity

pytestmark = pytest.mark.golden
CLOSE: dict[str, float] = dict(atol=1e-4, rtol=0.0)
FOLDERS = golden_cases("llada2_uni", having="image_tokenizer.safetensors")


def write(golden: Path, folder: Path, **pixels: Any) -> dict[str, Tensor]:
    """The folder as it is released; returns all weights."""
    config, stored = (
        json.loads((golden / "config.json").read_text()),
        load_file(golden / "image_tokenizer_weights.safetensors"),
    )
    own = {name: value for name, value in stored.items() if not name.startswith("sigvq.")}
    write_tokenizer(folder, config["image_tokenizer"], {**config["preprocessor"], **pixels}, own)
    sigvq = {name.removeprefix("sigvq."): value for name, value in stored.items() if name not in own}
    torch.save(sigvq, folder / "sigvq_embedding.pt")
    return own


def picture(stored: dict[str, Tensor], number: int) -> Tensor:
    return stored[f"image_{number}"].permute(2, 0, 1)[None].float() / 255


@pytest.mark.parametrize("golden", FOLDERS)
def test_every_weight_maps_both_ways(golden, tmp_path):
    own = write(golden, tmp_path / "a")
    released = load_released(tmp_path / "a")
    assert released.family is SIGLIP_VQ
    back = released.state_dict()
    assert back.keys() == own.keys() and all(torch.equal(back[name], own[name]) for name in own)
    convert(tmp_path / "a", tmp_path / "b")
    convert(tmp_path / "b", tmp_path / "c")
    again = load_file(tmp_path / "c" / "model.safetensors")
    assert again.keys() == own.keys() and all(torch.equal(again[name], own[name]) for name in own)
    for file in ("config.json", "preprocessor_config.json"):
        assert json.loads((tmp_path / "c" / file).read_text()) == json.loads((tmp_path / "a" / file).read_text())


def check_tokens(
    released: Released, pictures: list[Tensor], patches: Tensor, hidden: Tensor, indices: Tensor
) -> Tensor:
    """Compare, and return the latents that were quantised, `[tokens, code_dim]`."""
    model: Any = released.model
    with torch.no_grad():
        torch.testing.assert_close(torch.cat([model.patches(one)[0] for one in pictures]), patches, **CLOSE)
        torch.testing.assert_close(torch.cat([model.hidden(one)[0] for one in pictures]), hidden, **CLOSE)
        latents = torch.cat([model.latents(one)[0].flatten(1).T for one in pictures])
    assert released.images is not None
    codes = torch.cat([released.images.encode(one).flatten() for one in pictures])
    assert torch.equal(codes, indices.long())
    return latents


@pytest.mark.parametrize("golden", FOLDERS)
def test_pictures_to_codes(golden, tmp_path):
    stored = load_file(golden / "image_tokenizer.safetensors")
    write(golden, tmp_path / "as_stored")
    released = load_released(tmp_path / "as_stored")
    count = sum(name.startswith("image_") and name.removeprefix("image_").isdecimal() for name in stored)
    pictures = [picture(stored, number) for number in range(count)]
    names = ("pixel_values", "hidden", "indices")
    latents = check_tokens(released, pictures, *(stored[name] for name in names))
    torch.testing.assert_close(latents, stored["quant_conv"], **CLOSE)
    side = released.model.factor
    grids = [[1, one.shape[-2] // side, one.shape[-1] // side] for one in pictures]
    assert grids == stored["image_grid_thw"].tolist()
    assert [list(released.images.encode(one).shape[1:]) for one in pictures] == [grid[1:] for grid in grids]
    write(golden, tmp_path / "merge_1", merge_size=1)
    values = (stored[f"merge1.image_0.{name}"] for name in names)
    check_tokens(load_released(tmp_path / "merge_1"), pictures[:1], *values)


@pytest.mark.parametrize("golden", FOLDERS)
@torch.no_grad()
def test_features_of_codes(golden, tmp_path):
    stored = load_file(golden / "image_tokenizer.safetensors")
    write(golden, tmp_path)
    grid = stored["image_grid_thw"][0, 1:].tolist()
    codes = stored["indices"][: grid[0] * grid[1]].long().reshape(1, *grid)
    assert torch.equal(doubled(codes), stored["sigvq.upsampled_ids"].long())
    made = load_features(tmp_path / "sigvq_embedding.pt")(codes)
    torch.testing.assert_close(made, stored["sigvq.features"], **CLOSE)


def toy(stored: dict[str, Tensor]) -> Callable[[int, Tensor, Tensor], Tensor]:
    """The velocity that stands for the network: stream 0 sees the codes, 1 does not."""

    def velocity(stream: int, x: Tensor, t: Tensor) -> Tensor:
        shift = stored["b"][stream].reshape(1, -1, 1, 1, 1) * (1 + t)
        return torch.einsum("ij,njfhw->nifhw", stored["A"][stream], x) + shift

    return velocity


@pytest.mark.parametrize("golden", FOLDERS)
def test_sampling_with_guidance(golden):
    stored = load_file(golden / "decoder_flow.safetensors")
    velocity, usual, times = toy(stored), FlowSettings(), []

    def guided(x: Tensor, t: Tensor) -> Tensor:
        times.append(float(t))
        pairs = zip(velocity(0, x, t), velocity(1, x, t), strict=True)  # picture by picture
        return torch.stack([guided_velocity(cond, uncond, usual.guidance_scale) for cond, uncond in pairs])

    z, at = stored["z"], stored["guided_velocity_times"]
    torch.testing.assert_close(velocity(0, z, at), stored["unguided_velocity"], **CLOSE)
    torch.testing.assert_close(guided(z, at[0]), stored["guided_velocity"], **CLOSE)
    times.clear()
    steps = len(stored["normal.times"])
    states = [z, *flow_states(guided, z, replace(usual, steps=steps))]
    torch.testing.assert_close(torch.stack(states), stored["normal.trajectory"], **CLOSE)
    torch.testing.assert_close(torch.tensor(times), stored["normal.times"], **CLOSE)


@pytest.mark.parametrize("golden", FOLDERS)
def test_sampling_with_fresh_noise(golden, monkeypatch):
    """The scheduler draws with diffusers' function, which gives the stored noise here."""
    stored, times = load_file(golden / "decoder_flow.safetensors"), []
    velocity, noise = toy(stored), iter(stored["turbo.noise"])
    monkeypatch.setattr(diffusers_scheduler, "randn_tensor", lambda *_, **__: next(noise))

    def seen(x: Tensor, t: Tensor) -> Tensor:
        times.append(float(t))
        return velocity(0, x, t)

    assert TURBO.guidance_scale == 1
    *_, last = flow_states(seen, stored["z"], replace(TURBO, steps=len(stored["turbo.times"])))
    torch.testing.assert_close(last, stored["turbo.result"].float(), **CLOSE)
    torch.testing.assert_close(torch.tensor(times), stored["turbo.times"], **CLOSE)
    assert next(noise, None) is None


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::unidiff.tokens.text.UnknownWords")
@pytest.mark.parametrize("golden", FOLDERS)
def test_the_whole_set_draws_pictures(golden, tmp_path):
    """Network and image tokenizer of the set with a small decoder for its features: words to codes to pixels, row by row."""
    found = next(one for one in golden_checkpoints() if one.path == golden / "weights.safetensors")
    write_golden_pipeline(tmp_path / "model", found.path, found.config, found.vocabulary, found.words)
    shutil.rmtree(tmp_path / "model" / "image_tokenizer")
    write(golden, tmp_path / "model" / "image_tokenizer")
    features = load_features(tmp_path / "model" / "image_tokenizer" / "sigvq_embedding.pt")
    write_decoder(tmp_path / "model", width=features.prior_token_embedding.embedding_dim)
    pipe = UniDiffPipeline.from_pretrained(tmp_path / "model")
    pipe.set_progress_bar_config(disable=True)
    pipe.images.decode_with("decoder", 2)
    side = 32 * pipe.images.factor * pipe.images.upscale  # the set has one mark, that of 32 rows or columns
    few: dict[str, Any] = {"steps": 1, "output_type": "pt", "guidance_scale": 1.0}
    drawn = pipe.text_to_image(["w1 w2", "w3"], generator=0, height=side, width=side, **few)
    assert drawn.images.shape == (2, 3, side, side) and drawn.codes.shape == (2, 32, 32)
    alone = pipe.text_to_image("w3", generator=[int(drawn.seeds[1])], **few)
    assert torch.equal(alone.codes[0], drawn.codes[1]) and torch.equal(alone.images[0], drawn.images[1])
