"""`CellVQModel`: a small VQ autoencoder whose codes depend on one cell of pixels each.

Group norms look at the whole picture and stacked convolutions at neighbouring cells, so that the same sprite would get other
codes at every place, and a generative model had to learn them all. Here the encoder sees exactly one `factor x factor` cell;
the decoder looks at neighbouring cells and pixels to join them sharply. Codes are cosine-nearest (Yu et al. 2021,
arXiv 2110.04627, section 3.2: low-dimensional, l2-normalised codes).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from unidiff.schema import Between, Layers, Rows, Width
from unidiff.tokens.image.vq import Quantized, QuantizedAutoencoder


class ChannelNorm(nn.Module):
    """RMS norm over channels at each place of `[B, C, H, W]`: unlike a group norm it looks nowhere else."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.float().square().mean(1, keepdim=True) + 1e-6).to(x.dtype)
        return x * scale * self.weight[:, None, None].to(x.dtype)


def _silent(layer: nn.Conv2d) -> nn.Conv2d:
    """The layer, whose output is 0 until it is trained."""
    for weights in layer.parameters():
        nn.init.zeros_(weights)
    return layer


class CellBlock(nn.Module):
    """norm, k x k convolution, SiLU, 1 x 1 convolution, added to the input."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(channels)
        self.conv1 = nn.Conv2d(channels, 2 * channels, kernel, padding=kernel // 2)
        self.conv2 = _silent(nn.Conv2d(2 * channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.silu(self.conv1(self.norm(x))))


class PictureContext(nn.Module):
    """Adds a projection of the picture's mean over all cells to each cell; starts silent.

    A code that says nothing of the background leaves its colour to the decoder, which finds it in the cells that show
    nothing else, however far away they are.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 1)
        self.conv2 = _silent(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.silu(self.conv1(x.mean((2, 3), keepdim=True))))


class CellVQModel(QuantizedAutoencoder):
    """VQ autoencoder for images `[B, 3, H, W]` in [0, 1].

    Args:
        factor: pixels per code along each side, a power of two.
        codebook_size: number of codes.
        code_dim: dimensions of a code vector.
        encoder_width, encoder_depth: channels and residual blocks over single cells.
        decoder_widths: channels at 1/factor, then at each doubling of the resolution; the rest is a pixel shuffle.
        decoder_depths: residual 3 x 3 blocks at each of these resolutions.
        decoder_context: whether the decoder also looks at the mean over the whole picture, after its first block.
    """

    kind = "cell"
    has_cell_codes = True

    @register_to_config
    def __init__(
        self,
        factor: Annotated[int, Between(2, 1024)] = 8,
        codebook_size: Rows = 2048,
        code_dim: Width = 8,
        encoder_width: Width = 256,
        encoder_depth: Layers = 2,
        decoder_widths: Sequence[Width] = (192, 64),
        decoder_depths: Sequence[Layers] = (3, 2),
        decoder_context: bool = False,
    ) -> None:
        super().__init__()
        self.check_arguments()
        if factor < 2 or factor & (factor - 1):
            raise ValueError(f"factor {factor} must be a power of two, at least 2")
        if len(decoder_widths) != len(decoder_depths) or 2 ** (len(decoder_widths) - 1) > factor:
            given = f"decoder_widths {tuple(decoder_widths)} and decoder_depths {tuple(decoder_depths)}"
            most = factor.bit_length()
            raise ValueError(f"{given} must have the same length, at most {most} for factor {factor}")
        self.encoder = nn.Sequential(
            nn.Conv2d(3, encoder_width, factor, stride=factor),
            *(CellBlock(encoder_width, 1) for _ in range(encoder_depth)),
            ChannelNorm(encoder_width),
            nn.Conv2d(encoder_width, code_dim, 1),
        )
        self.register_buffer("codebook", F.normalize(torch.randn(codebook_size, code_dim), dim=-1))
        layers: list[nn.Module] = [nn.Conv2d(code_dim, decoder_widths[0], 1)]
        for level, (width, depth) in enumerate(zip(decoder_widths, decoder_depths, strict=True)):
            if level:
                layers += [nn.Conv2d(decoder_widths[level - 1], 4 * width, 1), nn.PixelShuffle(2)]
            layers += [CellBlock(width, 3) for _ in range(depth)]
        if decoder_context:
            layers.insert(2, PictureContext(decoder_widths[0]))
        step = factor // 2 ** (len(decoder_widths) - 1)
        layers += [ChannelNorm(decoder_widths[-1]), nn.Conv2d(decoder_widths[-1], 3 * step * step, 1)]
        if step > 1:
            layers.append(nn.PixelShuffle(step))
        self.decoder = nn.Sequential(*layers)

    @property
    def factor(self) -> int:
        return int(self.config.factor)

    @property
    def codebook_size(self) -> int:
        return int(self.config.codebook_size)

    def latents(self, images: Tensor) -> Tensor:
        """Unit vectors `[B, d, h, w]`, float32 whatever autocast says: nearest codes must not depend on bf16 rounding."""
        return F.normalize(self.encoder(images.to(next(self.encoder.parameters()).dtype) * 2 - 1).float(), dim=1)

    def quantize(self, latents: Tensor) -> Quantized:
        """Nearest codes by cosine, in float32."""
        with torch.autocast(latents.device.type, enabled=False):
            codes = (latents.movedim(1, -1) @ self.codebook.float().T).argmax(-1)  # [B, h, w]
            return Quantized(codes, self.lookup(codes), latents)

    def commitment(self, found: Quantized) -> Tensor:
        """One minus the mean cosine; codes follow by averages, not by gradient."""
        return (1 - (found.latents * found.vectors).sum(1)).mean()

    def lookup(self, codes: Tensor) -> Tensor:
        return F.embedding(codes, self.codebook.float()).movedim(-1, 1)

    def decode_vectors(self, vectors: Tensor) -> Tensor:
        return self.decoder(vectors.to(next(self.encoder.parameters()).dtype)) * 0.5 + 0.5
