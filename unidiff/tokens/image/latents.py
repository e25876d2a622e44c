"""Pictures as continuous latents: an autoencoder of diffusers, or the code vectors of a VQ tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from unidiff.tokens.image.vq import QuantizedAutoencoder, VQImageTokenizer, check_images


class PictureLatents(Protocol):
    """Pixels to latents `[B, C, H, W]` and back.

    Attributes:
        factor: pixels per patch of the network along each side. channels: C. model: the network behind it.
        codebook_size: 0, as latents are no codes.
    """

    factor: int
    channels: int
    model: Any
    codebook_size: int

    def encode(self, images: Tensor) -> Tensor:
        """float `[B, 3, h, w]` in [0, 1] to float32 `[B, C, H, W]`."""
        ...

    def decode(self, latents: Tensor, seeds: Tensor | None = None) -> Tensor:
        """float `[B, C, H, W]` to float32 `[B, 3, h, w]` in [0, 1]; there is no noise for `seeds` to choose."""
        ...


class _Latents:
    codebook_size = 0
    draws = False  # a decoder without noise of its own
    upscale = 1  # pixels of pictures drawn, per pixel of pictures read
    model: Any

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Move the weights, as `nn.Module.to`."""
        self.model.to(*args, **kwargs)
        return self


class AutoencoderLatents(_Latents):
    """Latents of diffusers' `AutoencoderKL`: (z - shift_factor) * scaling_factor of pixels in [-1, 1].

    Args:
        model: the autoencoder. patch_size: latent pixels per token of the network.
    """

    def __init__(self, model: Any, patch_size: int) -> None:
        self.model: Any = model.eval()
        self.channels = int(model.config.latent_channels)
        self.pixels = 2 ** (len(model.config.block_out_channels) - 1)
        self.factor = self.pixels * patch_size

    @classmethod
    def from_folder(cls, folder: Path, patch_size: int) -> AutoencoderLatents:
        """Of an `AutoencoderKL` folder, in float32; `FileNotFoundError` for none, `ValueError` for weights that do not fit."""
        from diffusers.models import AutoencoderKL

        from unidiff.weights.model import load_checked

        model, _ = load_checked(AutoencoderKL.from_pretrained, "AutoencoderKL", str(folder), torch_dtype=torch.float32)
        return cls(model, patch_size)

    @torch.no_grad()
    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """See `PictureLatents`. Latents are the mean of the posterior, or with `noise` `[B, C, H, W]` a draw from it."""
        check_images(images, self.factor)
        posterior = self.model.encode(images.to(self.device, self.dtype) * 2 - 1).latent_dist
        z = posterior.mean if noise is None else posterior.mean + posterior.std * noise.to(posterior.mean)
        return self.scaled(z).float()

    def scaled(self, z: Tensor) -> Tensor:
        """What the autoencoder's encoder gives, as the network takes it."""
        return (z - (self.model.config.shift_factor or 0)) * self.model.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor, seeds: Tensor | None = None) -> Tensor:
        """See `PictureLatents`."""
        return (self.pixels_of(latents).float() * 0.5 + 0.5).clamp(0, 1)

    def pixels_of(self, latents: Tensor) -> Tensor:
        """float `[B, 3, h, w]`, in [-1, 1] but for overshoots."""
        z = latents.to(self.device, self.dtype) / self.model.config.scaling_factor
        return self.model.decode(z + (self.model.config.shift_factor or 0)).sample


class CodeLatents(_Latents):
    """Latents that are the vectors of a VQ tokenizer's codes, times `scale`; what is decoded goes to its nearest code first.

    Raises:
        ValueError: a tokenizer without code vectors.
    """

    def __init__(self, images: VQImageTokenizer, scale: float) -> None:
        if not isinstance(images.model, QuantizedAutoencoder):
            raise ValueError(f"a {type(images.model).__name__} has no code vectors, which latents are made of")
        self.images, self.model, self.scale = images, images.model, scale
        self.factor = images.factor
        self.channels = int(self.model.lookup(torch.zeros(1, 1, 1, dtype=torch.long, device=self.device)).shape[1])

    def encode(self, images: Tensor) -> Tensor:
        """See `PictureLatents`."""
        codes = self.images.encode(images)
        return self.model.lookup(codes).float() * self.scale

    def decode(self, latents: Tensor, seeds: Tensor | None = None) -> Tensor:
        """See `PictureLatents`."""
        return self.images.decode(self.codes(latents))

    @torch.no_grad()
    def codes(self, latents: Tensor) -> Tensor:
        """int64 `[B, h, w]`, the nearest codes."""
        return self.model.quantize(latents.to(self.device).float() / self.scale).codes
