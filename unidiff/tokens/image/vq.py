"""`VQImageTokenizer`: one small interface over every image tokenizer, and the registry that finds them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from inspect import isabstract, signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unidiff.errors import plain, read_json
from unidiff.files import path_of
from unidiff.registry import Registry
from unidiff.schema import check_arguments
from unidiff.tokens.image.protocol import ImageTokenizerModel, check_codes, check_images
from unidiff.tokens.image.quantized import TrainableTokenizer
from unidiff.weights.model import load_checked, save_model


def _saved_name(value: Any) -> str | None:
    found = isinstance(value, type) and issubclass(value, ImageTokenizerModel) and not isabstract(value)
    return value.network_class().__name__ if found else None


IMAGE_TOKENIZERS: Registry[type[ImageTokenizerModel]] = Registry(
    "image_tokenizers", "unidiff.tokens.image", _saved_name
)
"""By the class name in a folder's config."""


def coder_of(network: nn.Module) -> ImageTokenizerModel:
    """The image tokenizer behind a network of ours or of another library. Raises `ValueError` for one that is none."""
    kinds = [IMAGE_TOKENIZERS[cls.__name__] for cls in type(network).__mro__ if cls.__name__ in IMAGE_TOKENIZERS]
    if not kinds or not isinstance(network, nn.Module):
        raise ValueError(
            f"the image tokenizer is a {type(network).__name__}; expected one of {', '.join(IMAGE_TOKENIZERS)}"
        )
    return kinds[0].adapt(network)


def network_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """All settings of a network to train: `kind`, and what that kind's `maker` takes.

    Raises:
        ValueError: a kind that cannot be trained, or settings that it does not know or of another type.
    """
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
    """Images to codes and back.

    Args:
        model: one of `IMAGE_TOKENIZERS`: a `CellVQModel`, a `ConvVQModel` (LlamaGen), an `LFQModel` (MAGVIT-v2), a diffusers
            `VQModel`, ...

    Attributes:
        factor: pixels per code along each side.
        codebook_size: number of codes.
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
        """float `[B, 3, H, W]` in [0, 1] -> int64 codes `[B, H/factor, W/factor]`.

        Raises:
            ValueError: wrong shape, dtype, range, or a side that `factor` does not divide.
        """
        check_images(images, self.factor)
        return self._coder.encode(images.to(self.device))

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """int64 codes `[B, h, w]` -> float32 `[B, 3, h * factor, w * factor]` in [0, 1].

        Raises:
            ValueError: a wrong shape or a code outside the codebook.
        """
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
            FileNotFoundError: no `config.json` there.
            ValueError: an unknown kind of tokenizer, or weights that do not fit.
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
