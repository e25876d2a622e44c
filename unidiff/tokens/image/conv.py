"""The convolutional autoencoder of VQGAN (Esser et al. 2021, arXiv 2012.09841) and the tokenizers that descend from it.

LlamaGen's VQ-8 and VQ-16 (`ConvVQModel`) and the MAGVIT-v2 tokenizer of Show-o and MMaDA (`LFQModel`) are this network with
different widths, depths and attention, and another quantizer in the middle. Every layer computes in the dtype of its input:
weights stored in float16 are used in float32, because the decoder's activations overflow float16.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, cast

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from unidiff.schema import Between, Depth, Index, Rows, Width
from unidiff.tokens.image.vq import Quantized, QuantizedAutoencoder

NORM_GROUPS = 32
NORM_EPS = 1e-6
_AT_ONCE = 2048  # latents whose distances are held at once


class Conv(nn.Conv2d):
    """`Conv2d` that computes in the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight.to(x.dtype), cast(Tensor, self.bias).to(x.dtype))


class ImageNorm(nn.Module):
    """Group norm with 32 groups, in the dtype of its input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        if channels % NORM_GROUPS:
            raise ValueError(f"{channels} channels; this autoencoder needs multiples of {NORM_GROUPS} at every level")
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x, NORM_GROUPS, self.weight.to(x.dtype), self.bias.to(x.dtype), NORM_EPS)


class ResidualBlock(nn.Module):
    """Twice norm, SiLU, 3 x 3 convolution, added to the input (through a 1 x 1 convolution where the width changes)."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = ImageNorm(inner), Conv(inner, outer, 3, padding=1)
        self.norm2, self.conv2 = ImageNorm(outer), Conv(outer, outer, 3, padding=1)
        self.shortcut = Conv(inner, outer, 1) if inner != outer else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return h + (x if self.shortcut is None else self.shortcut(x))


class ImageAttention(nn.Module):
    """Single-head attention over all places of `[B, C, h, w]`, added to the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = ImageNorm(channels)
        self.q, self.k, self.v, self.out = (Conv(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (part(h).flatten(2).mT for part in (self.q, self.k, self.v))  # [B, h w, C]
        mixed = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        return x + self.out(mixed.mT.reshape(x.shape))


class Level(nn.Module):
    """Residual blocks at one resolution, each with attention where asked, then half or double the resolution.

    Args:
        inner, outer: channels coming in, channels of the level. depth: residual blocks. direction: "down", "up" or "none".
    """

    def __init__(self, inner: int, outer: int, depth: int, attention: bool, direction: str) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ResidualBlock(inner if i == 0 else outer, outer) for i in range(depth))
        self.attentions = nn.ModuleList(ImageAttention(outer) for _ in range(depth)) if attention else None
        self.direction = direction
        kinds: dict[str, dict[str, Any]] = {"down": {"stride": 2}, "up": {"padding": 1}}
        self.resample = Conv(outer, outer, 3, **kinds[direction]) if direction in kinds else None

    def forward(self, x: Tensor) -> Tensor:
        for block, attention in zip(self.blocks, self.attentions or [nn.Identity()] * len(self.blocks), strict=True):
            x = attention(block(x))
        if self.resample is None:
            return x
        if self.direction == "down":
            return self.resample(F.pad(x, (0, 1, 0, 1)))  # one zero row and column, at the bottom and right only
        return self.resample(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Middle(nn.Module):
    """Block, attention, block at the lowest resolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1, self.block_2 = ResidualBlock(channels, channels), ResidualBlock(channels, channels)
        self.attention = ImageAttention(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attention(self.block_1(x)))


class ConvSide(nn.Module):
    """One side of the autoencoder, with f = 2^(levels - 1): pixels `[B, 3, H, W]` to latents `[B, z, H/f, W/f]`, or back.

    Args:
        channels, multipliers, depths, z_channels: as in `ConvTokenizerModel`.
        attention: attention after every block of the lowest resolution (the middle always has one).
        up: from latents to pixels; `levels` then start at the lowest resolution, in the order in which they run.
    """

    def __init__(
        self,
        channels: int,
        multipliers: Sequence[int],
        depths: Sequence[int],
        z_channels: int,
        attention: bool,
        up: bool = False,
    ) -> None:
        super().__init__()
        last = len(multipliers) - 1
        order = list(range(last, -1, -1) if up else range(last + 1))
        lowest = channels * multipliers[-1]
        widths = [lowest if up else channels, *(channels * multipliers[i] for i in order)]
        directions = ["up" if up else "down"] * last + ["none"]
        self.up = up
        self.conv_in = Conv(z_channels if up else 3, widths[0], 3, padding=1)
        if up:
            self.middle = Middle(lowest)
        self.levels = nn.ModuleList(
            Level(widths[n], widths[n + 1], depths[i], attention and i == last, directions[n])
            for n, i in enumerate(order)
        )
        if not up:
            self.middle = Middle(lowest)
        self.norm_out, self.conv_out = ImageNorm(widths[-1]), Conv(widths[-1], 3 if up else z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for part in (self.middle, *self.levels) if self.up else (*self.levels, self.middle):
            x = part(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class ConvTokenizerModel(QuantizedAutoencoder):
    """Encoder, quantizer, decoder for images `[B, 3, H, W]` in [0, 1]; subclasses bring the quantizer.

    Encoding is always in float32 (float64 for float64 weights), so codes do not depend on how weights are stored;
    decoding too unless the weights are bfloat16, which cannot overflow.

    Args:
        encoder_channels, decoder_channels: width at multiplier 1.
        encoder_multipliers, encoder_depths, decoder_multipliers, decoder_depths: width and number of residual blocks
            of each level, highest resolution first.
        level_attention: attention after every block of the lowest level; the middle always has it.
        z_channels: channels between the network and its 1 x 1 convolutions.

    Raises:
        ValueError: lists of different lengths, or a width that is no multiple of 32.
    """

    encoder: ConvSide
    decoder: ConvSide
    quant_conv: Conv
    post_quant_conv: Conv

    def _make_networks(self, c: Any, code_dim: int) -> None:
        sides = ((c.encoder_multipliers, c.encoder_depths), (c.decoder_multipliers, c.decoder_depths))
        if len({len(part) for side in sides for part in side}) != 1 or not c.encoder_multipliers:
            names = ("encoder_multipliers", "encoder_depths", "decoder_multipliers", "decoder_depths")
            *most, last = (f"{name} {tuple(getattr(c, name))}" for name in names)
            raise ValueError(f"{', '.join(most)} and {last} must have one entry per level each")
        self.encoder = ConvSide(c.encoder_channels, *sides[0], c.z_channels, c.level_attention)
        self.quant_conv = Conv(c.z_channels, code_dim, 1)
        self.post_quant_conv = Conv(code_dim, c.z_channels, 1)
        self.decoder = ConvSide(c.decoder_channels, *sides[1], c.z_channels, c.level_attention, up=True)

    @property
    def factor(self) -> int:
        return 2 ** (len(self.config.encoder_multipliers) - 1)

    def latents(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, enabled=False):
            x = images.to(torch.float64 if self._weight_dtype == torch.float64 else torch.float32)
            return self.quant_conv(self.encoder(x * 2 - 1))  # the network sees [-1, 1]

    def decode_vectors(self, vectors: Tensor) -> Tensor:
        dtype = torch.float32 if self._weight_dtype == torch.float16 else self._weight_dtype
        with torch.autocast(vectors.device.type, enabled=False):
            return self.decoder(self.post_quant_conv(vectors.to(dtype))) * 0.5 + 0.5

    @property
    def _weight_dtype(self) -> torch.dtype:
        return self.quant_conv.weight.dtype


class ConvVQModel(ConvTokenizerModel):
    """The tokenizer of LlamaGen (Sun et al. 2024, arXiv 2406.06525, section 2.1); the defaults are its VQ-16.

    Latents and code vectors are l2-normalised before they are compared, and the decoder sees normalised code vectors; the
    stored codebook need not be normalised.

    Args:
        codebook_size, code_dim: rows and columns of the codebook.
        l2_norm: compare and decode unit vectors.
        usage_window: how many of the last codes `codebook_used` remembers (a training statistic that released files
            carry); 0 for none.
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
        initial = torch.empty(codebook_size, code_dim).uniform_(-1 / codebook_size, 1 / codebook_size)
        self.codebook = nn.Parameter(initial)
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
    """Lookup-free quantization (MAGVIT-v2, Yu et al. 2023, arXiv 2310.05737, 3.1); the defaults are `showlab/magvitv2`.

    A code is the binary number of the signs of its latent: channel 0 is the most significant bit, a bit is 1 where the
    latent is positive (0 counts as negative), and the vector of a code has +1 and -1.

    Args:
        code_dim: bits of a code; there are 2^code_dim codes.
        z_channels: None for `code_dim`.
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
