"""`QuantizedAutoencoder`: encoder, quantizer, decoder, as all image tokenizers of our own are built."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

from torch import Tensor

from unidiff.tokens.image.protocol import ImageTokenizerModel
from unidiff.weights.model import CheckedModel


@dataclass(frozen=True)
class Quantized:
    """Codes int64 `[B, h, w]`, their vectors `[B, d, h, w]`, and the latents `[B, d, h, w]` that were compared with these."""

    codes: Tensor
    vectors: Tensor
    latents: Tensor


class QuantizedAutoencoder(CheckedModel, ImageTokenizerModel):
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
