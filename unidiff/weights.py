"""Loading diffusers-style folders strictly: diffusers only warns when weights are missing, extra or misshaped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import ModelMixin

M = TypeVar("M", bound=ModelMixin)


def load_model_strictly(model_class: type[M], folder: str | Path, dtype: torch.dtype = torch.float32) -> M:
    """`model_class.from_pretrained(folder)`, but any doubt about a weight or a config key is an error.

    Raises:
        FileNotFoundError: the folder holds no `config.json`.
        ValueError: an unknown config key; a missing, unexpected or misshaped weight; a NaN or infinite weight.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; name a folder that holds a saved {model_class.__name__}")
    config = json.loads(path.read_text(encoding="utf-8"))
    found = config.get("_class_name", model_class.__name__)
    if found != model_class.__name__:
        raise ValueError(f"{path} holds a {found}, not a {model_class.__name__}; name the right folder")
    known = set(model_class._get_init_keys(model_class))
    if unknown := sorted(k for k in config if not k.startswith("_") and k not in known):
        raise ValueError(f"{path} has unknown keys {unknown}; {model_class.__name__} knows {sorted(known - {'self'})}")
    info: dict[str, Any]
    model, info = model_class.from_pretrained(  # type: ignore[misc]
        str(folder), torch_dtype=dtype, output_loading_info=True, low_cpu_mem_usage=False, use_safetensors=True
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            names = [k if isinstance(k, str) else k[0] for k in info[kind]]
            raise ValueError(f"{folder}: {kind.replace('_', ' ')} {names[:3]} ({len(names)} in all); wrong checkpoint?")
    for name, value in model.state_dict().items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise ValueError(f"{folder}: weight {name!r} holds NaN or infinite values; the checkpoint is damaged")
    return model
