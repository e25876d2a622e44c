"""Diffusers' `VQModel` (Muddit, Meissonic, Lumina) as an image tokenizer: pixels in [0, 1], its convention."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from copy import deepcopy
from typing import Annotated, Any, Literal, cast

import torch
from diffusers import VQModel
from torch import Tensor, nn

from unidiff.schema import Between, Rows, Width, check_arguments
from unidiff.tokens.image.protocols import Reconstruction, TrainableTokenizer

_LEVELS = 16  # of resolutions
# what it takes for granted; a place in a list of blocks costs seconds to build, so lists are short
_TYPES: dict[str, Any] = {
    **dict.fromkeys(("in_channels", "out_channels", "latent_channels", "norm_num_groups"), Width),
    "block_out_channels": Sequence[Width],
    "layers_per_block": Annotated[int, Between(1, 64)],
    "num_vq_embeddings": Rows,
    "vq_embed_dim": Width | None,
    "norm_type": Literal["group", "spatial"],
}


class DiffusersVQ(TrainableTokenizer):
    """A `VQModel` with the interface of the others."""

    kind = "vqmodel"

    def __init__(self, network: VQModel) -> None:
        self.network: Any = cast(Any, network)  # diffusers' decorators hide the types of its models

    @property
    def factor(self) -> int:
        return 2 ** (len(self.network.config.block_out_channels) - 1)

    @property
    def codebook_size(self) -> int:
        return int(self.network.config.num_vq_embeddings)

    def encode(self, images: Tensor) -> Tensor:
        network = self._outside_float16()
        latents = network.encode(images.to(network.dtype)).latents.float()
        codes = deepcopy(network.quantize).float()(latents)[2][2]  # distances in float32; the model keeps its dtype
        return codes.reshape(latents.shape[0], *latents.shape[-2:])

    def decode(self, codes: Tensor) -> Tensor:
        network = self._outside_float16()
        shape = (*codes.shape, int(network.config.vq_embed_dim or network.config.latent_channels))
        given = codes.reshape(-1)
        if not network.config.lookup_from_codebook:
            given = network.quantize.get_codebook_entry(given, shape).to(network.dtype)
        return network.decode(given, force_not_quantize=True, shape=shape).sample

    def _outside_float16(self) -> Any:
        """Its activations exceed float16 (released configs say `force_upcast`): it goes to float32."""
        return self.network.float() if self.network.dtype == torch.float16 else self.network

    def reconstruct(self, images: Tensor, autocast: AbstractContextManager) -> Reconstruction:
        with autocast:  # its own forward would quantise in bf16
            hidden = self.network.encode(images).latents
        vectors, commitment, (_, _, flat) = self.network.quantize(hidden.float())
        with autocast:
            output = self.network.decode(vectors, force_not_quantize=True).sample
        return Reconstruction(output, flat.reshape(hidden.shape[0], *hidden.shape[-2:]), commitment)

    @classmethod
    def maker(cls) -> Callable[..., Any]:
        return _new_network

    @classmethod
    def network_class(cls) -> Any:
        return VQModel

    @classmethod
    def adapt(cls, network: nn.Module) -> DiffusersVQ:
        return cls(cast(VQModel, network))

    @classmethod
    def check_config(cls, config: Mapping[str, Any]) -> None:
        """Raise `ValueError` unless the arguments of a `VQModel` are known and of their types."""
        known = inspect.signature(VQModel.__init__).parameters.keys() - {"self"}
        if unknown := sorted(key for key in config if not key.startswith("_") and key not in known):
            raise ValueError(f"VQModel config has unknown keys {unknown}; expected some of {sorted(known)}")
        check_arguments(VQModel.__init__, config, "VQModel", **_TYPES)
        for name in ("down_block_types", "up_block_types"):
            blocks = config.get(name, ("",))
            if len(blocks) != len(config.get("block_out_channels", (64,))) or not 1 <= len(blocks) <= _LEVELS:
                raise ValueError(f"VQModel {name} has {len(blocks)} entries; expected one per level, at most {_LEVELS}")


def _new_network(
    factor: Annotated[int, Between(1, 128)] = 8,
    codebook_size: Rows = 2048,
    code_dim: Width = 8,
    decoder_widths: Sequence[Width] = (192, 64),
    norm_num_groups: Width = 8,
) -> Any:
    """A `VQModel` of `factor` pixels per code with these channels at each resolution, highest first."""
    levels = factor.bit_length()
    if factor & (factor - 1):
        raise ValueError(f"model.factor is {factor}; expected a power of two from 1 to 128")
    if len(decoder_widths) != levels:
        raise ValueError(f"vqmodel with factor {factor} needs {levels} decoder_widths, got {list(decoder_widths)}")
    if odd := [width for width in decoder_widths if width % norm_num_groups]:
        raise ValueError(f"model.decoder_widths holds {odd[0]}, which norm_num_groups={norm_num_groups} must divide")
    model: Any = VQModel(
        down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(decoder_widths), latent_channels=code_dim, num_vq_embeddings=codebook_size,
        norm_num_groups=norm_num_groups, mid_block_add_attention=False,
    )  # fmt: skip
    model.quantize.legacy = False  # diffusers puts beta on the codebook term otherwise
    return model
