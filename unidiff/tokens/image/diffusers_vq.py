"""Diffusers' `VQModel` (Muddit, Meissonic, Lumina) as an image tokenizer: pixels in [0, 1], its convention."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Annotated, Any, Literal, cast

import torch
from diffusers import VQModel
from torch import Tensor, nn

from unidiff.schema import Between, Rows, Width, check_arguments
from unidiff.tokens.image.protocol import ImageTokenizerModel

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


class DiffusersVQ(ImageTokenizerModel):
    """A `VQModel` with the interface of the others."""

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
