"""LlamaGen's VQ tokenizer: every stored tensor of the reference, entries, names both ways, batches, float16, bad files."""

from __future__ import annotations

import argparse
import json

import pytest
import torch
from conv_tokenizers import check_float16, check_sizes
from golden import golden_cases
from reference.image_tokenizer_losses import codebook_usage, vq_losses
from released_parts import Payload
from safetensors.torch import load_file

from unidiff.families.checkpoint.load import load_released
from unidiff.families.image_tokenizers import LLAMAGEN, LLAMAGEN_KEYS, LLAMAGEN_RELEASED
from unidiff.tokens.image.conv import ConvVQModel
from unidiff.tokens.image.vq import VQImageTokenizer

TINY = {
    "ch": 32,
    "num_res_blocks": 1,
    "z_channels": 12,
    "codebook_size": 40,
    "codebook_embed_dim": 4,
    "encoder_ch_mult": (1, 2),
    "decoder_ch_mult": (1, 1),
}


def read(folder, name: str) -> dict[str, torch.Tensor]:
    return load_file(folder / f"{name}.safetensors")


def config_of(folder) -> dict:
    config = json.loads((folder / "config.json").read_text())
    return {key: config[key] for key in (*LLAMAGEN_KEYS.used, *LLAMAGEN_KEYS.harmless) if key in config}


def load(path, config: dict, **options) -> VQImageTokenizer:
    return load_released(path, family="llamagen", config=config, **options).images


@pytest.fixture(scope="module")
def tiny() -> VQImageTokenizer:
    torch.manual_seed(0)
    return VQImageTokenizer(ConvVQModel(**LLAMAGEN.settings(TINY), usage_window=64))


@pytest.mark.golden
@pytest.mark.parametrize("folder", golden_cases("llamagen_vq"))
def test_every_weight_maps_both_ways_from_every_entry(folder, tmp_path):
    stored = read(folder, "weights")
    wrong = {name: torch.zeros_like(value) for name, value in stored.items()}
    prefixed = {f"module._orig_mod.{name}": value for name, value in stored.items()}
    contents = [
        stored,
        {"model": stored, "optimizer": {"lr": 1e-4}, "steps": 3},
        {"state_dict": prefixed},
        {"model": wrong, "ema": stored},  # the average wins, as upstream
        {"state_dict": wrong, "model": stored},
    ]
    for n, content in enumerate(contents):
        path = tmp_path / f"vq{n}.pt"
        torch.save(content, path)
        back = LLAMAGEN.export(load(path, config_of(folder)))
        assert set(back) == set(stored)
        for name, value in stored.items():
            assert back[name].dtype == value.dtype and torch.equal(back[name], value), name
    named = load(tmp_path / "vq3.pt", config_of(folder), entry="model")
    assert not named.model.codebook.any()
    with pytest.raises(ValueError, match=r"no entry 'ema'; it has \['model', 'optimizer'\]"):
        load(tmp_path / "vq1.pt", config_of(folder), entry="ema")


@pytest.mark.golden
@pytest.mark.parametrize("folder", golden_cases("llamagen_vq"))
@torch.no_grad()
def test_every_stored_tensor_matches_the_reference(folder):
    inputs, stored, config = read(folder, "inputs"), read(folder, "outputs"), config_of(folder)
    tokenizer = LLAMAGEN.load(read(folder, "weights"), config, torch.float32)[0]
    model, compared = tokenizer.model, set()

    def check(name: str, actual: torch.Tensor, atol: float = 0.0, rtol: float = 0.0) -> None:
        torch.testing.assert_close(actual, stored[name], atol=atol, rtol=rtol, msg=lambda m: f"{name}: {m}")
        compared.add(name)

    images = inputs["pixel_values"] * 0.5 + 0.5  # ours are in [0, 1]
    # 1. encode
    latents = model.latents(images)
    check("prequant", latents, atol=1e-4)
    found = model.quantize(latents)
    codes = tokenizer.encode(images)
    assert torch.equal(codes, found.codes)
    check("indices", codes.flatten())
    check("quant", found.vectors, atol=2e-4)
    # 2. training terms of the quantizer
    losses = vq_losses(model, stored["prequant"], config["commit_loss_beta"], config["entropy_loss_ratio"])
    check("train_vq_loss", losses.codebook, rtol=1e-4)
    check("train_commit_loss", losses.commitment, rtol=1e-4)
    check("train_entropy_loss", losses.entropy, rtol=1e-4)
    usage, window = codebook_usage(codes, torch.zeros_like(model.codebook_used), model.codebook_size)
    check("train_codebook_usage", torch.tensor(usage), atol=1e-6)
    assert torch.equal(window[-codes.numel() :].long(), codes.flatten())
    # 3. decode, unclipped for comparison, then through the tokenizer
    batch, _, height, width = inputs["codes_latent_shape"].tolist()
    given = inputs["codes"].reshape(batch, height, width)
    for name, grid in (("recon_forward", codes), ("recon_from_indices", codes), ("decoded_codes", given)):
        check(name, model.decode_vectors(model.lookup(grid)) * 2 - 1, atol=2e-4)
        expected = (stored[name] * 0.5 + 0.5).clamp(0, 1)
        torch.testing.assert_close(tokenizer.decode(grid), expected, atol=1e-4, rtol=0)
    assert not set(stored) - compared, f"stored tensors that nothing compares: {sorted(set(stored) - compared)}"


@pytest.mark.golden
@pytest.mark.parametrize("folder", golden_cases("llamagen_vq"))
@torch.no_grad()
def test_the_stored_float16_weights_give_the_same_without_a_cast(folder):
    """Weights stay float16 in memory and every layer computes in float32."""
    inputs, stored = read(folder, "inputs"), read(folder, "outputs")
    tokenizer = LLAMAGEN.load(read(folder, "weights"), config_of(folder))[0]
    assert tokenizer.dtype == torch.float16
    codes = tokenizer.encode(inputs["pixel_values"] * 0.5 + 0.5)
    assert torch.equal(codes.flatten(), stored["indices"])
    expected = (stored["recon_forward"] * 0.5 + 0.5).clamp(0, 1)
    torch.testing.assert_close(tokenizer.decode(codes), expected, atol=1e-4, rtol=0)


@pytest.mark.golden
@pytest.mark.parametrize("folder", golden_cases("llamagen_vq"))
def test_published_sizes(folder):
    published = json.loads((folder / "config.json").read_text())["released_reference"]
    assert set(published) == set(LLAMAGEN_RELEASED)
    for name, values in published.items():
        ours = {k: list(v) if isinstance(v, tuple) else v for k, v in LLAMAGEN_RELEASED[name].items()}
        assert ours == values, name


def test_float16_weights_whose_activations_exceed_its_range_stay_finite(tiny):
    check_float16(ConvVQModel(**LLAMAGEN.settings(TINY)), tiny, 2**18)


def test_any_size_that_divides_and_rows_alone_equal_rows_in_a_batch(tiny):
    check_sizes(tiny)


@torch.no_grad()
def test_lengths_of_latents_and_code_vectors_do_not_matter(tiny):
    latents = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    codes = tiny.model.quantize(latents).codes
    assert torch.equal(tiny.model.quantize(7 * latents).codes, codes)
    torch.testing.assert_close(tiny.model.lookup(codes).norm(dim=1), torch.ones(2, 3, 3))
    before = tiny.model.lookup(codes)
    tiny.model.codebook.data.mul_(torch.linspace(0.5, 2, 40)[:, None])
    assert torch.equal(tiny.model.quantize(latents).codes, codes)
    torch.testing.assert_close(tiny.model.lookup(codes), before)


@torch.no_grad()
def test_codes_are_the_nearest_also_where_a_batch_is_taken_in_parts(tiny):
    latents = torch.randn(3, 4, 32, 40, generator=torch.Generator().manual_seed(0))
    unit = torch.nn.functional.normalize(latents, dim=1)
    book = torch.nn.functional.normalize(tiny.model.codebook, dim=-1)
    nearest = torch.einsum("bdhw,kd->bhwk", unit, book).argmax(-1)
    codes = tiny.model.quantize(latents).codes
    assert codes.shape == (3, 32, 40) and (codes == nearest).float().mean() > 0.999  # ties of rounding


def test_folder_round_trip(tiny, tmp_path):
    tiny.save_pretrained(tmp_path)
    again = VQImageTokenizer.from_pretrained(tmp_path)
    codes = torch.arange(32).reshape(1, 4, 8)
    assert torch.equal(again.decode(codes), tiny.decode(codes))


def test_released_defaults_and_which_of_the_two_is_found_from_the_weights():
    for name, factor in (("VQ-16", 16), ("VQ-8", 8)):
        with torch.device("meta"):
            model = ConvVQModel(**LLAMAGEN.settings(LLAMAGEN_RELEASED[name]))
        assert (model.factor, model.codebook_size) == (factor, 16384)
        state = LLAMAGEN.export(VQImageTokenizer(model))
        assert state["decoder.conv_blocks.0.res.2.conv1.weight"].shape == (512, 512, 3, 3)
        assert state["quantize.embedding.weight"].shape == (16384, 8)
        state = {k: torch.zeros((), dtype=torch.float16).expand(v.shape) for k, v in state.items()}
        assert LLAMAGEN.load(state)[0].factor == factor


def test_bad_files_are_refused(tiny, tmp_path):
    state = LLAMAGEN.export(tiny)
    path = tmp_path / "vq.pt"
    torch.save({"model": state, "args": argparse.Namespace(lr=1e-4)}, path)  # as training scripts save it
    load(path, TINY)
    for legacy in (False, True):
        torch.save({"model": state}, path, _use_new_zipfile_serialization=not legacy)
        whole = path.read_bytes()
        for size in (10, len(whole) // 2, len(whole) - 20):
            path.write_bytes(whole[:size])
            with pytest.raises(ValueError, match=r"vq\.pt is damaged; download it again"):
                load(path, TINY)
    for content in (b"", b"<!DOCTYPE html>", b"version https://git-lfs.github.com/spec/v1"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"vq\.pt is no torch file"):
            load(path, TINY)
    marker = tmp_path / "made"
    for legacy in (False, True):
        torch.save({"model": state, "note": Payload(str(marker))}, path, _use_new_zipfile_serialization=not legacy)
        with pytest.raises(ValueError, match="could run code"):
            load(path, TINY)
        assert not marker.exists()
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="holds a list"):
        load(path, TINY)
    with pytest.raises(ValueError, match=r"suffix '\.zip'"):
        (tmp_path / "vq.zip").write_bytes(b"")
        load(tmp_path / "vq.zip", TINY)
    with pytest.raises(FileNotFoundError, match="holds none of"):
        (tmp_path / "nothing").mkdir()
        load(tmp_path / "nothing", TINY)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**TINY, "chh": 3}, r"unknown LlamaGen tokenizer config keys \['chh'\]"),
        ({**TINY, "num_res_blocks": 2}, r"missing \(encoder.conv_blocks.0.res.1"),
        ({**TINY, "ch": 64}, r"gives shape .* the config asks for"),
        ({**TINY, "codebook_size": 41}, r"'quantize.embedding.weight' gives shape \(40, 4\)"),
        (LLAMAGEN_RELEASED["VQ-8"], "does not fit its config"),
    ],
)
def test_configs_that_do_not_fit_are_refused(tiny, config, message):
    with pytest.raises(ValueError, match=message):
        LLAMAGEN.load(LLAMAGEN.export(tiny), config)
