"""What unidiff asks of an image tokenizer: an encoder from pixels to codes and a decoder from codes to pixels."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from unidiff.schema import check_value


class HasCodes(Protocol):
    @property
    @abstractmethod
    def factor(self) -> int:
        """Pixels per code along each side."""

    @property
    @abstractmethod
    def codebook_size(self) -> int:
        """Codes are in `[0, codebook_size)`."""


@runtime_checkable
class ImageEncoder(HasCodes, Protocol):
    """Pixels to codes."""

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """float `[B, 3, H, W]` in [0, 1], H and W multiples of `factor` -> int64 codes `[B, H/factor, W/factor]`."""


@runtime_checkable
class PixelDecoder(HasCodes, Protocol):
    """Codes to pixels; may be stochastic."""

    @abstractmethod
    def decode(self, codes: Tensor) -> Tensor:
        """int64 codes `[B, h, w]` -> float `[B, 3, h * factor, w * factor]` in [0, 1]."""


class ImageTokenizerModel(ImageEncoder, PixelDecoder):
    """The network of an image tokenizer, an entry of `unidiff.tokens.image.vq.IMAGE_TOKENIZERS`.

    Adding one is a module in `unidiff.tokens.image` with a `CheckedModel` that is also of this class: a folder's config names
    it. Images and codes are checked before it sees them. It chooses its precision; pixels need not be clipped.
    """

    @classmethod
    def network_class(cls) -> Any:
        """What is saved and loaded: this class itself, or the class of another library that it adapts."""
        return cls

    @classmethod
    def adapt(cls, network: nn.Module) -> Any:
        """An instance for a network of `network_class`."""
        return network

    @classmethod
    def check_config(cls, config: Mapping[str, Any]) -> None:
        """Raise `ValueError` for a config that no such network has, where its own constructor does not."""


def check_images(images: Tensor, factor: int) -> None:
    """Raise one clear sentence unless `images` is float `[B, 3, H, W]` in [0, 1] with sides that `factor` divides."""
    check_value(images, Tensor, "the batch of images")
    if not images.is_floating_point():
        raise ValueError(f"images have dtype {images.dtype}; expected floats in [0, 1], so divide 8-bit values by 255")
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images have shape {tuple(images.shape)}; expected [B, 3, H, W] (RGB)")
    height, width = images.shape[-2:]
    if height % factor or width % factor or not height or not width:
        raise ValueError(f"image size {height}x{width} must be a positive multiple of {factor}; resize or crop it")
    low, high = images.amin().item(), images.amax().item()
    if not (low >= -1e-3 and high <= 1 + 1e-3):
        raise ValueError(f"image values span [{low:.3g}, {high:.3g}]; expected finite values in [0, 1]")


def check_codes(codes: Tensor, codebook_size: int) -> None:
    """Raise one clear sentence unless `codes` is integer `[B, h, w]` with values below `codebook_size`."""
    check_value(codes, Tensor, "the batch of codes")
    if codes.ndim != 3 or codes.is_floating_point() or codes.is_complex() or not codes.numel():
        raise ValueError(f"codes have shape {tuple(codes.shape)} and dtype {codes.dtype}; expected int64 [B, h, w]")
    low, high = int(codes.min()), int(codes.max())
    if low < 0 or high >= codebook_size:
        raise ValueError(f"codes span [{low}, {high}]; expected values in [0, {codebook_size})")
