"""`ConvVQModel`: the convolutional VQ tokenizer of LlamaGen (Sun et al. 2024, arXiv 2406.06525, section 2.1).

Latents and code vectors are l2-normalised before they are compared, and the decoder sees normalised code vectors; the
stored codebook need not be normalised. Wrap a model in `VQImageTokenizer` to encode and decode images.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from unidiff.schema import Depth, Index, Rows, Width
from unidiff.tokens.image.conv_autoencoder import ConvTokenizerModel
from unidiff.tokens.image.quantized import Quantized

_AT_ONCE = 2048  # latents whose distances are held at once


class ConvVQModel(ConvTokenizerModel):
    """Convolutional VQ autoencoder; images `[B, 3, H, W]` in [0, 1]. The defaults are LlamaGen's VQ-16.

    Args:
        codebook_size, code_dim: rows and columns of the codebook.
        encoder_channels, decoder_channels: width at multiplier 1.
        encoder_multipliers, encoder_depths, decoder_multipliers, decoder_depths: width and number of residual blocks
            of each level, highest resolution first.
        level_attention: attention after every block of the lowest level.
        z_channels: channels between the network and its 1 x 1 convolutions.
        l2_norm: compare and decode unit vectors.
        usage_window: how many of the last codes `codebook_used` remembers (a training statistic that released files
            carry); 0 for none.

    Raises:
        ValueError: lists of different lengths, or a width that is no multiple of 32.
    """

    @register_to_config
    def __init__(
        self,
        codebook_size: Rows = 16384,
        code_dim: Width = 8,
        encoder_channels: Width = 128,
        encoder_multipliers: Sequence[Depth] = (1, 1, 2, 2, 4),
        encoder_depths: Sequence[Depth] = (2, 2, 2, 2, 2),
        decoder_channels: Width = 128,
        decoder_multipliers: Sequence[Depth] = (1, 1, 2, 2, 4),
        decoder_depths: Sequence[Depth] = (3, 3, 3, 3, 3),
        z_channels: Width = 256,
        level_attention: bool = True,
        l2_norm: bool = True,
        usage_window: Index = 0,
    ) -> None:
        super().__init__()
        self.check_arguments()
        self._make_networks(self.config, code_dim)
        self.codebook = nn.Parameter(
            torch.empty(codebook_size, code_dim).uniform_(-1 / codebook_size, 1 / codebook_size)
        )
        if usage_window:
            self.register_buffer("codebook_used", torch.zeros(usage_window))

    @property
    def codebook_size(self) -> int:
        return int(self.config.codebook_size)

    def quantize(self, latents: Tensor) -> Quantized:
        """Nearest codes of latents `[B, d, h, w]`, in float32; `latents` of the result are the ones that were compared."""
        with torch.autocast(latents.device.type, enabled=False):
            compared = self._unit(latents.float().movedim(1, -1))  # [B, h, w, d]
            parts = compared.flatten(0, -2).split(_AT_ONCE)  # the distances of a batch to 16,384 codes are gigabytes
            codes = torch.cat([self._distances(part).argmin(-1) for part in parts]).reshape(compared.shape[:-1])
            return Quantized(codes, self.lookup(codes), compared.movedim(-1, 1))

    def lookup(self, codes: Tensor) -> Tensor:
        return F.embedding(codes, self._unit(self.codebook.float())).movedim(-1, 1)

    def _unit(self, vectors: Tensor) -> Tensor:
        return F.normalize(vectors, dim=-1) if self.config.l2_norm else vectors

    def _distances(self, compared: Tensor) -> Tensor:
        """Squared distances `[..., K]` of `compared` `[..., d]` to all codes."""
        codebook = self._unit(self.codebook.float())
        squares = compared.square().sum(-1, keepdim=True) + codebook.square().sum(-1)
        return squares - 2 * compared @ codebook.T
