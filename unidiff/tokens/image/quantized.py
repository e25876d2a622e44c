"""`TrainableTokenizer`, what a training run asks of a network, and `QuantizedAutoencoder`, as all of our own are built."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from unidiff.tokens.image.protocol import ImageTokenizerModel
from unidiff.weights.model import CheckedModel


@dataclass(frozen=True)
class Reconstruction:
    """A training step's forward.

    Attributes:
        output: images `[B, 3, H, W]`, not clipped.
        codes: int64 `[B, h, w]`.
        commitment: scalar, small where latents lie near their codes.
        latents: `[B, d, h, w]` without gradient, for a codebook of averages; None where the codebook learns by gradient.
    """

    output: Tensor
    codes: Tensor
    commitment: Tensor
    latents: Tensor | None = None


class TrainableTokenizer(ImageTokenizerModel):
    """A network that `train_image_tokenizer` can train.

    Attributes:
        kind: its name in the configs of runs (`model.kind`); "" for one that is only loaded.
        has_cell_codes: a code is a function of one cell of pixels, and its vector a row of the buffer `codebook`, of unit
            length, that training keeps as the average of the latents.
    """

    kind: ClassVar[str] = ""
    has_cell_codes: ClassVar[bool] = False

    @classmethod
    def maker(cls) -> Callable[..., Any]:
        """Makes a fresh network (torch's global generator) from the other settings of `model`."""
        return cls

    @abstractmethod
    def reconstruct(self, images: Tensor, autocast: AbstractContextManager) -> Reconstruction:
        """Encode and decode `[B, 3, H, W]` under `autocast`, quantise in float32, with gradients for all weights."""


@dataclass(frozen=True)
class Quantized:
    """Codes int64 `[B, h, w]`, their vectors `[B, d, h, w]`, and the latents `[B, d, h, w]` that were compared with these."""

    codes: Tensor
    vectors: Tensor
    latents: Tensor


class QuantizedAutoencoder(CheckedModel, TrainableTokenizer):
    """Images `[B, 3, H, W]` in [0, 1] to codes and back, in four steps that training and tests use one by one."""

    @abstractmethod
    def latents(self, images: Tensor) -> Tensor:
        """Images to latents `[B, d, h, w]` before quantization."""

    @abstractmethod
    def quantize(self, latents: Tensor) -> Quantized:
        """Codes of latents `[B, d, h, w]`."""

    @abstractmethod
    def lookup(self, codes: Tensor) -> Tensor:
        """Vectors float32 `[B, d, h, w]` of codes `[B, h, w]`, as the decoder sees them."""

    @abstractmethod
    def decode_vectors(self, vectors: Tensor) -> Tensor:
        """Code vectors `[B, d, h, w]` to images `[B, 3, H, W]`, 0 to 1 but not clipped."""

    def encode(self, images: Tensor) -> Tensor:
        return self.quantize(self.latents(images)).codes

    def decode(self, codes: Tensor) -> Tensor:
        return self.decode_vectors(self.lookup(codes))

    def reconstruct(self, images: Tensor, autocast: AbstractContextManager) -> Reconstruction:
        with autocast:
            latents = self.latents(images)
        found = self.quantize(latents)
        with autocast:  # straight-through: the vectors' values, the latents' gradient
            output = self.decode_vectors(latents + (found.vectors - latents).detach())
        kept = latents.detach() if self.has_cell_codes else None
        return Reconstruction(output, found.codes, self.commitment(found), kept)

    def commitment(self, found: Quantized) -> Tensor:
        """Mean squared distance of latents and vectors; a quarter of it moves the encoder, the rest the codebook."""
        encoder = F.mse_loss(found.latents, found.vectors.detach())
        return 0.25 * encoder + F.mse_loss(found.vectors, found.latents.detach())
