"""Diffusers' `VQModel` (the image tokenizer of Muddit, Meissonic and Lumina) as a family: its names are diffusers' own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import VQModel
from torch import Tensor

from unidiff.checked import build_on_meta
from unidiff.families.checkpoint.keymap import Entry, KeyMap, assemble
from unidiff.families.family import Family, config_names, tokenizer
from unidiff.tokens.image.diffusers_vq import DiffusersVQ
from unidiff.tokens.image.vq import VQImageTokenizer


def load_vq_model(
    state_dict: Mapping[str, Any],
    config: Mapping[str, Any] | None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> VQImageTokenizer:
    """Image tokenizer from the weights and the `config.json` of a `VQModel` folder.

    Args:
        state_dict: diffusers' names.
        config: the `config.json` beside them.
        dtype: cast the weights; None keeps the checkpoint's.
        device: where to load; None for the CPU.

    Raises:
        ValueError: an unknown config key, or weights left over, missing, misshaped or not finite.
    """
    fields = {key: value for key, value in (config or {}).items() if not key.startswith("_")}
    DiffusersVQ.check_config(fields)
    model: Any = build_on_meta(VQModel, fields)
    names = KeyMap([Entry(name, name) for name in model.state_dict()], 0)
    return VQImageTokenizer(assemble(model, names, state_dict, dtype, device))


def vq_model_state_dict(tokenizer: VQImageTokenizer) -> dict[str, Tensor]:
    """The tokenizer's weights under diffusers' names."""
    return dict(tokenizer.model.state_dict())


VQ_MODEL = Family(
    name="vq_model",
    keys=(r"^encoder\.down_blocks\.0\.resnets\.0\.", r"^quantize\.embedding\.weight$"),
    fits=lambda config: config_names(config, "VQModel") or "num_vq_embeddings" in config,
    load=tokenizer(load_vq_model),
    export=lambda images, spelling: vq_model_state_dict(images),
)
