"""Image tokenizers: shapes, locality of codes, strict loading, bad input; ours and diffusers' VQModel."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import VQModel
from safetensors.torch import load_file, save_file

from unidiff.tokens.image.protocols import ImageEncoder, PixelDecoder
from unidiff.tokens.image.vq import CellVQModel, VQImageTokenizer


def cell_model(factor: int = 4) -> CellVQModel:
    torch.manual_seed(0)
    return CellVQModel(factor, 32, 4, 16, 1, (16, 8), (1, 1))


def vq_model(lookup: bool = False) -> VQModel:
    torch.manual_seed(0)
    return VQModel(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 16), latent_channels=4, num_vq_embeddings=32, norm_num_groups=4,
        mid_block_add_attention=False, lookup_from_codebook=lookup,
    )  # fmt: skip


@pytest.fixture(params=["cell", "vqmodel", "vqmodel-lookup"])
def tokenizer(request: pytest.FixtureRequest) -> VQImageTokenizer:
    if request.param == "cell":
        return VQImageTokenizer(cell_model())
    return VQImageTokenizer(vq_model(lookup=request.param.endswith("lookup")))


def test_any_size_that_divides_round_trips_in_shape(tokenizer: VQImageTokenizer) -> None:
    assert isinstance(tokenizer, ImageEncoder) and isinstance(tokenizer, PixelDecoder)
    assert (tokenizer.factor, tokenizer.codebook_size) == (4, 32)
    for height, width in ((8, 8), (12, 20)):
        images = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(1))
        codes = tokenizer.encode(images)
        assert codes.shape == (2, height // 4, width // 4) and codes.dtype == torch.long
        assert int(codes.min()) >= 0 and int(codes.max()) < 32
        decoded = tokenizer.decode(codes)
        assert decoded.shape == images.shape and decoded.dtype == torch.float32
        assert float(decoded.min()) >= 0 and float(decoded.max()) <= 1


def test_batch_rows_are_independent(tokenizer: VQImageTokenizer) -> None:
    images = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    assert torch.equal(tokenizer.encode(images)[1:2], tokenizer.encode(images[1:2]))


def test_a_cell_code_depends_on_its_own_cell_alone() -> None:
    tokenizer = VQImageTokenizer(cell_model())
    images = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    before = tokenizer.encode(images)
    images[..., 4:8, 8:12] = 1 - images[..., 4:8, 8:12]
    changed = tokenizer.encode(images) != before
    changed[0, 1, 2] = False
    assert not changed.any()
    assert torch.equal(tokenizer.encode(images.roll(4, -1)), tokenizer.encode(images).roll(1, -1))


def test_save_and_load(tokenizer: VQImageTokenizer, tmp_path) -> None:
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(4))
    tokenizer.save_pretrained(tmp_path)
    again = VQImageTokenizer.from_pretrained(tmp_path)
    assert torch.equal(again.encode(images), tokenizer.encode(images))
    assert torch.equal(again.decode(again.encode(images)), tokenizer.decode(tokenizer.encode(images)))


def test_bf16_weights_decode_to_finite_pixels(tmp_path) -> None:
    VQImageTokenizer(cell_model()).save_pretrained(tmp_path)
    tokenizer = VQImageTokenizer.from_pretrained(tmp_path, torch.bfloat16)
    decoded = tokenizer.decode(tokenizer.encode(torch.rand(1, 3, 8, 8)))
    assert decoded.dtype == torch.float32 and bool(decoded.isfinite().all())


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "divide 8-bit"),
        (torch.zeros(3, 8, 8), r"expected \[B, 3, H, W\]"),
        (torch.zeros(1, 1, 8, 8), r"expected \[B, 3, H, W\]"),
        (torch.zeros(1, 3, 8, 6), "multiple of 4"),
        (torch.full((1, 3, 8, 8), 2.0), "finite values in"),
        (torch.full((1, 3, 8, 8), float("nan")), "finite values in"),
    ],
)
def test_bad_images_are_refused(images: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VQImageTokenizer(cell_model()).encode(images)


@pytest.mark.parametrize("codes", [torch.zeros(2, 2).long(), torch.full((1, 2, 2), 32), torch.full((1, 2, 2), -1)])
def test_bad_codes_are_refused(codes: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="codes"):
        VQImageTokenizer(cell_model()).decode(codes)


def test_wrong_folders_are_refused(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        VQImageTokenizer.from_pretrained(tmp_path / "nowhere")
    VQImageTokenizer(cell_model()).save_pretrained(tmp_path)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    save_file({k: v for k, v in tensors.items() if k != "codebook"}, weights)
    with pytest.raises(ValueError, match="missing"):
        VQImageTokenizer.from_pretrained(tmp_path)
    tensors["codebook"] = tensors["codebook"] * float("nan")
    save_file(tensors, weights)
    with pytest.raises(ValueError, match="NaN"):
        VQImageTokenizer.from_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"_class_name": "UNet2DModel"}))
    with pytest.raises(ValueError, match="UNet2DModel"):
        VQImageTokenizer.from_pretrained(tmp_path)


def test_model_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="power of two"):
        CellVQModel(factor=6)
    with pytest.raises(ValueError, match="same length"):
        CellVQModel(decoder_widths=(8,), decoder_depths=(1, 1))
