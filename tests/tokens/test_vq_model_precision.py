"""Diffusers' `VQModel` in low precision: no overflow, no change of its weights by using it."""

from __future__ import annotations

import pytest
import torch
from diffusers import VQModel
from muddit_parts import VQ

from unidiff.tokens.image.vq import VQImageTokenizer


def tokenizer(dtype: torch.dtype = torch.float32, scale: float = 1.0, lookup: bool = True) -> VQImageTokenizer:
    torch.manual_seed(0)
    blocks = dict(down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2)
    model = VQModel(**blocks, lookup_from_codebook=lookup, **VQ)
    with torch.no_grad():
        model.quantize.embedding.weight.normal_()
        model.decoder.conv_in.weight.mul_(scale)  # the norms behind it undo the scale
    return VQImageTokenizer(model.to(dtype))


@pytest.mark.parametrize("lookup", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_images_and_codes_round_the_clock(dtype: torch.dtype, lookup: bool):
    """Encoding first used to leave the codebook in another dtype than the decoder."""
    images, exact, low = torch.rand(2, 3, 8, 8), tokenizer(lookup=lookup), tokenizer(dtype, lookup=lookup)
    codes = exact.encode(images)
    agreement = (low.encode(images) == codes).float().mean()
    assert agreement > 0.8
    for _ in range(2):
        torch.testing.assert_close(low.decode(codes), exact.decode(codes), atol=0.05, rtol=0)
        assert len({p.dtype for p in low.model.parameters()}) == 1
        low.encode(images)


def test_activations_beyond_float16_stay_finite():
    """The published configuration says `force_upcast`."""
    codes = torch.arange(16).view(1, 4, 4)
    exact, low = tokenizer(scale=2.0**17), tokenizer(torch.float16, 2.0**17)
    assert low.dtype == torch.float16 and bool(low.model.decoder.conv_in.weight.isfinite().all())
    vectors = exact.model.quantize.embedding(codes).movedim(-1, 1)
    assert exact.model.decoder.conv_in(exact.model.post_quant_conv(vectors)).abs().max() > 65504
    images = low.decode(codes)
    assert images.dtype == torch.float32 and bool(images.isfinite().all())
    torch.testing.assert_close(images, exact.decode(codes), atol=0.05, rtol=0)
    assert low.dtype == torch.float32  # it computes there, and says so
