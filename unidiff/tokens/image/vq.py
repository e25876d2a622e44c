"""`VQImageTokenizer`: one small interface over a VQ autoencoder, ours or diffusers' `VQModel`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import torch
from diffusers import VQModel
from torch import Tensor

from unidiff.checked import load_checked
from unidiff.errors import plain, read_json
from unidiff.files import path_of
from unidiff.saving import save_model
from unidiff.schema import Between, Rows, Width, check_arguments
from unidiff.tokens.image.cell import CellVQModel
from unidiff.tokens.image.conv import ConvVQModel
from unidiff.tokens.image.conv_autoencoder import ConvTokenizerModel
from unidiff.tokens.image.lfq import LFQModel
from unidiff.tokens.image.protocol import check_codes, check_images

_CLASSES: dict[str, Any] = {
    "CellVQModel": CellVQModel,
    "ConvVQModel": ConvVQModel,
    "LFQModel": LFQModel,
    "VQModel": VQModel,
}
_LEVELS = 16  # of resolutions
# what diffusers' `VQModel` takes for granted; a place in a list of blocks costs seconds to build, so lists are short
_VQ_TYPES: dict[str, Any] = {
    **dict.fromkeys(("in_channels", "out_channels", "latent_channels", "norm_num_groups"), Width),
    "block_out_channels": Sequence[Width],
    "layers_per_block": Annotated[int, Between(1, 64)],
    "num_vq_embeddings": Rows,
    "vq_embed_dim": Width | None,
    "norm_type": Literal["group", "spatial"],
}


def check_vq_config(config: Mapping[str, Any]) -> None:
    """Raise `ValueError` unless the arguments of a diffusers `VQModel` are known and of their types."""
    known = inspect.signature(VQModel.__init__).parameters.keys() - {"self"}
    if unknown := sorted(key for key in config if not key.startswith("_") and key not in known):
        raise ValueError(f"VQModel config has unknown keys {unknown}; expected some of {sorted(known)}")
    check_arguments(VQModel.__init__, config, "VQModel", **_VQ_TYPES)
    for name in ("down_block_types", "up_block_types"):
        blocks = config.get(name, ("",))
        if len(blocks) != len(config.get("block_out_channels", (64,))) or not 1 <= len(blocks) <= _LEVELS:
            raise ValueError(f"VQModel {name} has {len(blocks)} entries; expected one per level, at most {_LEVELS}")


class VQImageTokenizer:
    """Images to codes and back.

    Args:
        model: a `CellVQModel`, a `ConvVQModel` (LlamaGen), an `LFQModel` (MAGVIT-v2), or a diffusers `VQModel` (pixels
            in [0, 1], its convention).

    Attributes:
        factor: pixels per code along each side.
        codebook_size: number of codes.
    """

    def __init__(self, model: CellVQModel | ConvTokenizerModel | VQModel) -> None:
        if not isinstance(model, torch.nn.Module) or not hasattr(model, "config"):
            raise ValueError(f"the image tokenizer is a {type(model).__name__}; expected one of {', '.join(_CLASSES)}")
        self.model: Any = cast(Any, model)  # diffusers' decorators hide the types of its models
        self.model.eval()
        config = self.model.config
        if isinstance(model, ConvTokenizerModel):
            self.factor, self.codebook_size = model.factor, model.codebook_size
        elif isinstance(model, CellVQModel):
            self.factor, self.codebook_size = int(config.factor), int(config.codebook_size)
        else:
            self.factor = 2 ** (len(config.block_out_channels) - 1)
            self.codebook_size = int(config.num_vq_embeddings)

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
        self._leave_float16()
        images = images.to(self.device)
        if isinstance(self.model, ConvTokenizerModel):  # chooses its own precision
            return self.model.quantize(self.model.latents(images)).codes
        images = images.to(self.dtype)
        if isinstance(self.model, CellVQModel):
            return self.model.quantize(self.model.latents(images)).codes
        latents = self.model.encode(images).latents.float()
        codes = deepcopy(self.model.quantize).float()(latents)[2][2]  # distances in float32; the model keeps its dtype
        return codes.reshape(latents.shape[0], *latents.shape[-2:])

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """int64 codes `[B, h, w]` -> float32 `[B, 3, h * factor, w * factor]` in [0, 1].

        Raises:
            ValueError: a wrong shape or a code outside the codebook.
        """
        check_codes(codes, self.codebook_size)
        self._leave_float16()
        codes = codes.to(self.device)
        if isinstance(self.model, ConvTokenizerModel):
            images = self.model.decode_vectors(self.model.lookup(codes))
        elif isinstance(self.model, CellVQModel):
            images = self.model.decode_vectors(self.model.lookup(codes).to(self.dtype))
        else:
            shape = (*codes.shape, int(self.model.config.vq_embed_dim or self.model.config.latent_channels))
            if self.model.config.lookup_from_codebook:
                given: Tensor = codes.reshape(-1)
            else:
                given = self.model.quantize.get_codebook_entry(codes.reshape(-1), shape).to(self.dtype)
            images = self.model.decode(given, force_not_quantize=True, shape=shape).sample
        return images.float().clamp(0, 1)

    def _leave_float16(self) -> None:
        """Activations of diffusers' `VQModel` exceed float16 (released configs say `force_upcast`): it goes to float32."""
        if self.dtype == torch.float16 and not isinstance(self.model, ConvTokenizerModel | CellVQModel):
            self.model.float()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config and weights (safetensors); other files in the folder stay.

        Raises:
            ValueError: `folder` is a file or holds another model, or weights that hold NaN. OSError: a full disk.
        """
        if isinstance(self.model, VQModel):
            save_model(self.model, folder, self.model.save_pretrained)
        else:
            self.model.save_pretrained(folder)

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
        if not isinstance(name, str) or name not in _CLASSES:
            raise ValueError(f"{path} holds a {plain(name)!r}; expected one of {sorted(_CLASSES)}")
        if name == "VQModel":
            try:
                check_vq_config(config)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error
        model, _ = load_checked(_CLASSES[name].from_pretrained, name, str(folder), torch_dtype=dtype)
        return cls(model)
