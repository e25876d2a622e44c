"""What the rest of the package asks of an image tokenizer."""

from __future__ import annotations

from abc import abstractmethod
from typing import Protocol, runtime_checkable

from torch import Tensor, nn


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
    """Codes to pixels."""

    @abstractmethod
    def decode(self, codes: Tensor) -> Tensor:
        """int64 codes `[B, h, w]` -> float `[B, 3, h * factor, w * factor]` in [0, 1]."""


class StoredPart(Protocol):
    """A network that was not read yet. `load` may raise `FileNotFoundError` and `ValueError`; bytes are of the weights read."""

    def load(self) -> nn.Module: ...

    def weight_bytes(self) -> int: ...
