"""Diffusers' `VQModel` (the image tokenizer of Muddit, Meissonic and Lumina) as a family: its names are diffusers' own."""

from __future__ import annotations

from typing import Any

from diffusers import VQModel

from unidiff.families.checkpoint.keymap import KeyMap
from unidiff.families.family import Config, Family, Release, Tiny, config_names
from unidiff.tokens.image.diffusers_vq import DiffusersVQ


def vq_model_settings(config: Config) -> dict[str, Any]:
    """`VQModel` arguments of its own config; `ValueError` for an unknown or unusable one."""
    fields = {key: value for key, value in config.items() if not key.startswith("_")}
    DiffusersVQ.check_config(fields)
    return fields


# of Muddit and Meissonic; of Lumina-DiMOO's only factor 16 and 8,192 codes are stated
_PUBLISHED = {
    "_class_name": "VQModel",
    "block_out_channels": (128, 256, 256, 512, 768),
    "layers_per_block": 2,
    "latent_channels": 64,
    "num_vq_embeddings": 8192,
    "force_upcast": True,
    "down_block_types": ["DownEncoderBlock2D"] * 5,
    "up_block_types": ["UpDecoderBlock2D"] * 5,
}
_TINY = {
    "_class_name": "VQModel",
    "block_out_channels": [4, 4],
    "latent_channels": 4,
    "num_vq_embeddings": 16,
    "norm_num_groups": 2,
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "lookup_from_codebook": True,
}
VQ_MODEL = Family(
    name="vq_model",
    keys=(r"^encoder\.down_blocks\.0\.resnets\.0\.", r"^quantize\.embedding\.weight$"),
    fits=lambda config: config_names(config, "VQModel") or "num_vq_embeddings" in config,
    settings=vq_model_settings,
    keymap=lambda model, spelling: KeyMap.of(model),
    network=VQModel,
    releases=(Release("muddit-vq", _PUBLISHED),),
    unstated=("down_block_types", "up_block_types"),
    tiny=Tiny(_TINY, (0.693631, 0.446761, 0.261659, 1.0)),
)
