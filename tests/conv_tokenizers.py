"""What must hold of every convolutional image tokenizer, whatever its quantizer."""

from __future__ import annotations

import pytest
import torch

from unidiff.tokens.image.conv import ConvTokenizerModel
from unidiff.tokens.image.vq import VQImageTokenizer


@torch.no_grad()
def check_float16(loud: ConvTokenizerModel, quiet: VQImageTokenizer, scale: float) -> None:
    """Weights in float16 whose activations exceed its range decode to finite pixels."""
    loud.load_state_dict({k: v for k, v in quiet.model.state_dict().items() if k != "codebook_used"})
    loud.decoder.conv_in.weight.mul_(scale)  # the norms behind it undo the scale
    codes = torch.arange(12).reshape(1, 3, 4)
    assert bool((loud.decoder.conv_in(loud.post_quant_conv(loud.lookup(codes))).abs() > 65504).any())
    expected = VQImageTokenizer(loud).decode(codes)
    images = VQImageTokenizer(loud.half()).decode(codes)
    assert bool(images.isfinite().all())
    torch.testing.assert_close(images, expected, atol=0.02, rtol=0)


@torch.no_grad()
def check_sizes(tokenizer: VQImageTokenizer) -> None:
    """Any size that the factor 2 divides; rows alone equal rows in a batch; others are refused."""
    images = torch.rand(3, 3, 6, 10, generator=torch.Generator().manual_seed(0))
    codes = tokenizer.encode(images)
    assert codes.shape == (3, 3, 5) and codes.dtype == torch.int64 and codes.unique().numel() > 3
    decoded = tokenizer.decode(codes)
    assert decoded.shape == images.shape and decoded.min() >= 0 and decoded.max() <= 1
    for row in range(3):
        assert torch.equal(tokenizer.encode(images[row : row + 1])[0], codes[row])
        torch.testing.assert_close(tokenizer.decode(codes[row : row + 1])[0], decoded[row], atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="6x9 must be a positive multiple of 2"):
        tokenizer.encode(images[..., :9])
    with pytest.raises(ValueError, match=rf"values in \[0, {tokenizer.codebook_size}\)"):
        tokenizer.decode(codes + tokenizer.codebook_size)
