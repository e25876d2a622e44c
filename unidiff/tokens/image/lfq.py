"""`LFQModel`: an image tokenizer with lookup-free quantization (MAGVIT-v2, Yu et al. 2023, arXiv 2310.05737, section 3.1).

A code is the binary number of the signs of its latent: channel 0 is the most significant bit, a bit is 1 where the
latent is positive (0 counts as negative), and the vector of a code has +1 and -1. Wrap a model in `VQImageTokenizer`
to encode and decode images.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from unidiff.schema import Between, Depth, Width
from unidiff.tokens.image.conv_autoencoder import ConvTokenizerModel
from unidiff.tokens.image.quantized import Quantized


def bit_values(width: int, device: torch.device | None = None) -> Tensor:
    """Value of each bit, int64 `[width]`, most significant first."""
    return 2 ** torch.arange(width - 1, -1, -1, device=device)


def lfq_codes(latents: Tensor) -> Tensor:
    """Latents `[B, d, h, w]` to codes int64 `[B, h, w]`."""
    return torch.einsum("bdhw,d->bhw", (latents > 0).long(), bit_values(latents.shape[1], latents.device))


def lfq_vectors(codes: Tensor, width: int) -> Tensor:
    """Codes int64 `[...]` to their +1/-1 vectors, float32 `[..., width]`."""
    return ((codes[..., None] & bit_values(width, codes.device)) != 0).float() * 2 - 1


class LFQModel(ConvTokenizerModel):
    """Convolutional autoencoder with sign-bit codes; images `[B, 3, H, W]` in [0, 1]. The defaults are `showlab/magvitv2`.

    Args:
        code_dim: bits of a code; there are 2^code_dim codes.
        encoder_channels, decoder_channels: width at multiplier 1.
        encoder_multipliers, encoder_depths, decoder_multipliers, decoder_depths: width and number of residual blocks
            of each level, highest resolution first.
        level_attention: attention at the lowest level; the released model has it only in the middle.
        z_channels: channels between the network and its 1 x 1 convolutions; None for `code_dim`.

    Raises:
        ValueError: lists of different lengths, or a width that is no multiple of 32.
    """

    @register_to_config
    def __init__(
        self,
        code_dim: Annotated[int, Between(1, 20)] = 13,
        encoder_channels: Width = 128,
        encoder_multipliers: Sequence[Depth] = (1, 2, 2, 4, 4),
        encoder_depths: Sequence[Depth] = (4, 3, 4, 3, 4),
        decoder_channels: Width = 128,
        decoder_multipliers: Sequence[Depth] = (1, 1, 2, 2, 4),
        decoder_depths: Sequence[Depth] = (4, 4, 3, 4, 3),
        z_channels: Width | None = None,
        level_attention: bool = False,
    ) -> None:
        super().__init__()
        self.check_arguments()
        if z_channels is None:
            self.register_to_config(z_channels=code_dim)
        self._make_networks(self.config, code_dim)

    @property
    def codebook_size(self) -> int:
        return 2**self.config.code_dim

    def quantize(self, latents: Tensor) -> Quantized:
        """Sign bits of latents `[B, d, h, w]`."""
        codes = lfq_codes(latents)
        return Quantized(codes, self.lookup(codes), latents)

    def lookup(self, codes: Tensor) -> Tensor:
        """+1/-1 vectors float32 `[B, d, h, w]` of codes `[B, h, w]`."""
        return lfq_vectors(codes, self.config.code_dim).movedim(-1, 1)
