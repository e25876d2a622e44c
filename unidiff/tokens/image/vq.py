"""What an image tokenizer is, the registry that finds them all, and `VQImageTokenizer`, the one interface over them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from inspect import isabstract, signature
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unidiff.errors import plain, read_json
from unidiff.files import path_of
from unidiff.registry import Registry
from unidiff.schema import check_arguments, check_value
from unidiff.weights.model import CheckedModel, load_checked, save_model


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
    """The network of an image tokenizer, an entry of `IMAGE_TOKENIZERS`: a `CheckedModel` of this class in a module beside this.

    Images and codes are checked before it sees them. It chooses its precision; pixels need not be clipped.
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


def _saved_name(value: Any) -> str | None:
    """The class name in a folder's config."""
    found = isinstance(value, type) and issubclass(value, ImageTokenizerModel) and not isabstract(value)
    return value.network_class().__name__ if found else None


IMAGE_TOKENIZERS = Registry[type[ImageTokenizerModel]]("image_tokenizers", "unidiff.tokens.image", _saved_name)


def coder_of(network: nn.Module) -> ImageTokenizerModel:
    """The image tokenizer behind a network of ours or of another library; `ValueError` for one that is none."""
    kinds = [IMAGE_TOKENIZERS[cls.__name__] for cls in type(network).__mro__ if cls.__name__ in IMAGE_TOKENIZERS]
    if not kinds or not isinstance(network, nn.Module):
        names = ", ".join(IMAGE_TOKENIZERS)
        raise ValueError(f"the image tokenizer is a {type(network).__name__}; expected one of {names}")
    return kinds[0].adapt(network)


def network_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """All settings of a network to train: `kind`, and what that kind's `maker` takes; `ValueError` for others."""
    kind = given.get("kind", "cell")
    maker = _maker(kind)
    known = {name: p.default for name, p in signature(maker).parameters.items() if name != "self"}
    if unknown := sorted(given.keys() - known.keys() - {"kind"}):
        raise ValueError(f"model has settings that {kind!r} does not know: {unknown}; expected some of {sorted(known)}")
    check_arguments(maker, given, "model.")
    return {"kind": kind, **known, **given}


def new_network(settings: Mapping[str, Any]) -> Any:
    """A freshly initialised network (torch's global generator) of `network_settings`."""
    return _maker(settings["kind"])(**{name: value for name, value in settings.items() if name != "kind"})


def _maker(kind: Any) -> Callable[..., Any]:
    found = [cls for cls in IMAGE_TOKENIZERS.values() if issubclass(cls, TrainableTokenizer) and cls.kind]
    makers = {cls.kind: cls.maker() for cls in found}
    if not isinstance(kind, str) or kind not in makers:
        raise ValueError(f"model.kind is {kind!r:.80}; expected one of {', '.join(sorted(makers))}")
    return makers[kind]


class VQImageTokenizer:
    """Images to codes and back, with `factor` pixels per code along each side and `codebook_size` codes.

    Args:
        model: one of `IMAGE_TOKENIZERS`: a `CellVQModel`, a `ConvVQModel` (LlamaGen), an `LFQModel` (MAGVIT-v2), a diffusers
            `VQModel`, ...
    """

    def __init__(self, model: nn.Module) -> None:
        self._coder = coder_of(model)
        self.model: Any = model.eval()
        self.factor, self.codebook_size = self._coder.factor, self._coder.codebook_size

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def to(self, *args, **kwargs) -> VQImageTokenizer:
        """Move the weights, as `nn.Module.to`."""
        self.model.to(*args, **kwargs)
        return self

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """float `[B, 3, H, W]` in [0, 1] -> int64 codes `[B, H/factor, W/factor]`; `ValueError` as of `check_images`."""
        check_images(images, self.factor)
        return self._coder.encode(images.to(self.device))

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """int64 codes `[B, h, w]` -> float32 `[B, 3, h * factor, w * factor]` in [0, 1]; errors as of `check_codes`."""
        check_codes(codes, self.codebook_size)
        return self._coder.decode(codes.to(self.device)).float().clamp(0, 1)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config and weights (safetensors); other files in the folder stay.

        Raises:
            ValueError: `folder` is a file or holds another model, or weights that hold NaN. OSError: a full disk.
        """
        ours = self._coder is self.model
        if ours:
            self.model.save_pretrained(folder)
        else:
            save_model(self.model, folder, self.model.save_pretrained)

    @classmethod
    def from_pretrained(cls, folder: str | Path, dtype: torch.dtype = torch.float32) -> VQImageTokenizer:
        """Read a folder written by `save_pretrained`, or any diffusers `VQModel` folder.

        Raises:
            FileNotFoundError: no `config.json` there. ValueError: an unknown kind of tokenizer, or weights that do not fit.
        """
        path = path_of(folder) / "config.json"
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist; name a folder with an image tokenizer")
        config = read_json(path, "an image tokenizer's config")
        name = config.get("_class_name")
        if not isinstance(name, str) or name not in IMAGE_TOKENIZERS:
            raise ValueError(f"{path} holds a {plain(name)!r}; expected one of {sorted(IMAGE_TOKENIZERS)}")
        kind = IMAGE_TOKENIZERS[name]
        try:
            kind.check_config(config)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        model, _ = load_checked(kind.network_class().from_pretrained, name, str(folder), torch_dtype=dtype)
        return cls(model)


def check_images(images: Tensor, factor: int) -> None:
    """Raise `ValueError` unless `images` is float `[B, 3, H, W]` in [0, 1] with sides that `factor` divides."""
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
    """Raise `ValueError` unless `codes` is integer `[B, h, w]` with values below `codebook_size`."""
    if not isinstance(codes, Tensor):
        check_value(codes, Tensor, "the batch of codes")
    if codes.ndim != 3 or codes.is_floating_point() or codes.is_complex() or not codes.numel():
        raise ValueError(f"codes have shape {tuple(codes.shape)} and dtype {codes.dtype}; expected int64 [B, h, w]")
    low, high = int(codes.min()), int(codes.max())
    if low < 0 or high >= codebook_size:
        raise ValueError(f"codes span [{low}, {high}]; expected values in [0, {codebook_size})")
