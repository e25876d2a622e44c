"""What an image tokenizer is: what the rest of the package asks of it, and what its network is made of."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
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


class ImageTokenizerModel(ImageEncoder, PixelDecoder):
    """The network of an image tokenizer, an entry of `IMAGE_TOKENIZERS`: a `CheckedModel` of this class in a module beside this.

    Images and codes are checked before it sees them. It chooses its precision; pixels need not be clipped.
    """

    draws: ClassVar[bool] = False  # whether decoding draws noise, see `draw`

    @property
    def upscale(self) -> int:
        """Pixels along a side of a decoded picture, divided by those of a picture that is encoded to as many codes."""
        return 1

    def draw(self, codes: Tensor, generators: Sequence[torch.Generator], quick: bool = False) -> Tensor:
        """`decode` of one that `draws`, with a generator for each row; `quick`: a preview, in a few passes of many."""
        return self.decode(codes)

    def parts_beside(self) -> Mapping[str, StoredPart]:
        """Networks that are read when they are first needed, by name."""
        return {}

    def decode_with(self, name: str | None = None, steps: int | None = None) -> None:
        """Decode with another of several decoders, or in another number of passes, from now on; None for what is chosen.

        Raises:
            ValueError: no such decoder, or none to choose from.
        """
        raise ValueError(f"a {type(self).__name__} has one way to decode; leave the pixel decoder and its steps out")

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


@dataclass(frozen=True)
class Reconstruction:
    """A training step's forward."""

    output: Tensor  # images [B, 3, H, W], not clipped
    codes: Tensor  # int64 [B, h, w]
    commitment: Tensor  # scalar, small where latents lie near their codes
    latents: Tensor | None = None  # [B, d, h, w] without gradient, for a codebook of averages


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
