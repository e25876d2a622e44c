"""The MAGVIT-v2 tokenizer: every stored tensor of the reference, names both ways, batches, sizes, float16, bad input."""

from __future__ import annotations

import json

import pytest
import torch
from conv_tokenizers import check_float16, check_sizes
from golden import golden_cases
from reference.image_tokenizer_losses import lfq_losses
from safetensors.torch import load_file, save_file

from unidiff.families.checkpoint.load import load_released
from unidiff.families.image_tokenizers import MAGVIT, MAGVIT_RELEASED
from unidiff.tokens.image.conv import LFQModel, bit_values, lfq_codes, lfq_vectors
from unidiff.tokens.image.protocols import ImageEncoder, PixelDecoder
from unidiff.tokens.image.vq import VQImageTokenizer

TINY = {
    "codebook_dim": 5,
    "encoder": {"ch": 32, "ch_mult": (1, 2), "num_res_blocks": (1, 2), "z_channels": 5},
    "decoder": {"ch": 32, "ch_mult": (1, 1), "num_res_blocks": (2, 1), "z_channels": 5},
}


def config_of(folder) -> dict:
    config = json.loads((folder / "config.json").read_text())
    return {key: config[key] for key in ("codebook_dim", "encoder", "decoder")}


def load(folder, dtype: torch.dtype | None = None) -> VQImageTokenizer:
    return read(folder / "weights.safetensors", config_of(folder), dtype)


def read(path, config: dict, dtype: torch.dtype | None = None) -> VQImageTokenizer:
    return load_released(path, dtype, family="magvit", config=config).images


@pytest.fixture(scope="module")
def tiny() -> VQImageTokenizer:
    torch.manual_seed(0)
    return VQImageTokenizer(LFQModel(**MAGVIT.settings(TINY)))


@pytest.mark.golden
@pytest.mark.parametrize("folder", golden_cases("magvitv2"))
def test_every_weight_maps_both_ways(folder):
    stored = load_file(folder / "weights.safetensors")
    back = MAGVIT.export(load(folder))
    assert set(back) == set(stored)
    for name, value in stored.items():
        assert back[name].dtype == value.dtype and torch.equal(back[name], value), name


@pytest.mark.golden
@pytest.mark.parametrize("folder", golden_cases("magvitv2"))
@torch.no_grad()
def test_every_stored_tensor_matches_the_reference(folder):
    inputs, stored = load_file(folder / "inputs.safetensors"), load_file(folder / "outputs.safetensors")
    tokenizer = load(folder)
    model, compared = tokenizer.model, set()

    def check(name: str, actual: torch.Tensor, **tolerance) -> None:
        torch.testing.assert_close(actual, stored[name], **tolerance, msg=lambda m: f"{name}: {m}")
        compared.add(name)

    exact = {"atol": 0, "rtol": 0}
    images = inputs["pixel_values"] * 0.5 + 0.5  # ours are in [0, 1]
    # 1. encode
    latents = model.latents(images)
    check("prequant", latents, atol=1e-4, rtol=0)
    found = model.quantize(latents)
    check("quantized_states", found.vectors, atol=1e-5, rtol=0)
    codes = tokenizer.encode(images)
    assert torch.equal(codes, found.codes)
    check("get_code", codes.flatten(1), **exact)
    check("encode_indices", codes.flatten(1), **exact)
    check("lfq_indices_map", lfq_codes(stored["prequant"])[:, None], **exact)
    # 2. losses
    losses = lfq_losses(stored["prequant"])
    check("lfq_quantizer_loss", losses.quantizer, atol=0, rtol=1e-4)
    check("lfq_entropy_loss", losses.entropy, atol=0, rtol=1e-4)
    # 3. decode, unclipped for comparison, then through the tokenizer
    square = inputs["codes_square"]
    side = int(square.shape[1] ** 0.5)
    square = square.reshape(len(square), side, side)
    check("codebook_entries", model.lookup(square), **exact)
    rect = inputs["codes_rect"].reshape(-1, *inputs["codes_rect_hw"].tolist())
    for name, grid in (("decoded_square", square), ("decoded_rect", rect)):
        raw = model.decode_vectors(model.lookup(grid)) * 2 - 1
        check(name, raw, atol=2e-4, rtol=0)
        torch.testing.assert_close(tokenizer.decode(grid), (stored[name] * 0.5 + 0.5).clamp(0, 1), atol=1e-4, rtol=0)
    assert not set(stored) - compared, f"stored tensors that nothing compares: {sorted(set(stored) - compared)}"


@pytest.mark.golden
@pytest.mark.parametrize("folder", golden_cases("magvitv2"))
@torch.no_grad()
def test_weights_in_float16_decode_without_overflow(folder):
    inputs, stored = load_file(folder / "inputs.safetensors"), load_file(folder / "outputs.safetensors")
    tokenizer = load(folder, torch.float16)
    codes = inputs["codes_rect"].reshape(-1, *inputs["codes_rect_hw"].tolist())
    images = tokenizer.decode(codes)
    assert tokenizer.dtype == torch.float16 and images.dtype == torch.float32
    expected = (stored["decoded_rect"] * 0.5 + 0.5).clamp(0, 1)
    torch.testing.assert_close(images, expected, atol=0.02, rtol=0)
    agreement = tokenizer.encode(inputs["pixel_values"] * 0.5 + 0.5).flatten(1) == stored["get_code"]
    assert agreement.float().mean() > 0.95


def test_float16_weights_whose_activations_exceed_its_range_stay_finite(tiny):
    check_float16(LFQModel(**MAGVIT.settings(TINY)), tiny, 2**17)


@torch.no_grad()
def test_bfloat16_decodes_in_bfloat16_and_encodes_in_float32(tiny):
    low = LFQModel(**MAGVIT.settings(TINY))
    low.load_state_dict(tiny.model.state_dict())
    low.bfloat16()
    codes = torch.arange(12).reshape(1, 3, 4)
    assert low.decode_vectors(low.lookup(codes)).dtype == torch.bfloat16
    torch.testing.assert_close(VQImageTokenizer(low).decode(codes), tiny.decode(codes), atol=0.05, rtol=0)
    assert low.latents(torch.rand(1, 3, 4, 4)).dtype == torch.float32


def test_any_size_that_divides_and_rows_alone_equal_rows_in_a_batch(tiny):
    check_sizes(tiny)


def test_protocols_and_folder(tiny, tmp_path):
    assert isinstance(tiny, ImageEncoder) and isinstance(tiny, PixelDecoder)
    assert (tiny.factor, tiny.codebook_size) == (2, 32)
    tiny.save_pretrained(tmp_path)
    again = VQImageTokenizer.from_pretrained(tmp_path)
    codes = torch.arange(32).reshape(1, 4, 8)
    assert torch.equal(again.decode(codes), tiny.decode(codes))


def test_codes_are_sign_bits_most_significant_first():
    latents = torch.tensor([1.0, -2.0, 0.0, 1e-9]).reshape(1, 4, 1, 1)
    assert lfq_codes(latents).item() == 0b1001  # exactly 0 counts as negative
    assert lfq_vectors(torch.tensor(0b1001), 4).tolist() == [1, -1, -1, 1]
    assert bit_values(3).tolist() == [4, 2, 1]
    codes = torch.arange(2**6)
    assert torch.equal(lfq_codes(lfq_vectors(codes, 6).T[None, :, :, None])[0, :, 0], codes)


def test_commitment_moves_the_encoder_only_by_beta_and_the_straight_through_part():
    z = torch.tensor([0.5, -0.25]).reshape(1, 2, 1, 1).requires_grad_()
    lfq_losses(z, beta=0.25, multiplier=1.0).quantizer.backward()
    expected = 2 * torch.tensor([0.5, -0.75]) / 2 - 0.25 * 2 * torch.tensor([0.5, -0.75]) / 2
    torch.testing.assert_close(z.grad.flatten(), expected)


def test_released_defaults():
    kwargs = MAGVIT.settings(MAGVIT_RELEASED)
    assert kwargs["code_dim"] == 13 and kwargs["z_channels"] == 13
    with torch.device("meta"):
        model, default = LFQModel(**kwargs), LFQModel()
    assert {k: default.config[k] for k in kwargs} == kwargs
    assert (model.factor, model.codebook_size) == (16, 8192)
    names = MAGVIT.export(VQImageTokenizer(model))
    assert names["encoder.down.3.block.0.nin_shortcut.weight"].shape == (512, 256, 1, 1)
    assert names["decoder.up.3.block.0.nin_shortcut.weight"].shape == (256, 512, 1, 1)
    assert names["quantize.embedding"].shape == (8192, 13)


@pytest.mark.golden
@pytest.mark.parametrize("folder", golden_cases("magvitv2"))
def test_published_sizes(folder):
    published = json.loads((folder / "config.json").read_text())["released_reference"]
    assert published["codebook_dim"] == MAGVIT_RELEASED["codebook_dim"]
    for side in ("encoder", "decoder"):
        for key, value in MAGVIT_RELEASED[side].items():
            assert published[side][key] == (list(value) if isinstance(value, tuple) else value), (side, key)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codebook_dims": 3}, r"unknown MAGVIT-v2 config keys \['codebook_dims'\]"),
        ({"encoder": {**TINY["encoder"], "chh": 1}}, r"unknown MAGVIT-v2 encoder config keys \['chh'\]"),
        ({"encoder": {**TINY["encoder"], "double_z": True}}, "double_z"),
        ({"encoder": {**TINY["encoder"], "z_channels": 6}}, "different z_channels"),
        ({"encoder": {**TINY["encoder"], "num_res_blocks": (1,)}}, "one entry per level"),
        ({"decoder": {**TINY["decoder"], "num_res_blocks": (2, 2)}}, r"4 missing|8 missing"),
        ({"encoder": {**TINY["encoder"], "ch": 40}}, "multiples of 32"),
    ],
)
def test_bad_configs_are_refused(tiny, change, message):
    with pytest.raises(ValueError, match=message):
        MAGVIT.load(MAGVIT.export(tiny), {**TINY, **change})


def test_bad_files_are_refused(tiny, tmp_path):
    state = {name: value.contiguous() for name, value in MAGVIT.export(tiny).items()}
    path = tmp_path / "model.safetensors"
    save_file(state, path)
    assert torch.equal(read(tmp_path, TINY).model.decoder.conv_in.weight, tiny.model.decoder.conv_in.weight)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged"):
        read(path, TINY)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read(tmp_path / "other.bin", TINY)
    with pytest.raises(ValueError, match="power_vals"):
        MAGVIT.load({**state, "quantize.power_vals": bit_values(5).flip(0)}, TINY)
    with pytest.raises(ValueError, match=r"1 left over \(extra\)"):
        MAGVIT.load({**state, "extra": torch.zeros(1)}, TINY)
    state.pop("quantize.embedding")  # determined by the width: may be absent
    MAGVIT.load(state, TINY)
