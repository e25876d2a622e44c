"""Saving models so that what is written can be read: options that the loaders do not know are refused, files of others stay."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from unidiff.errors import plain, read_json
from unidiff.files import filling_folder, resolve_link
from unidiff.weights.checks import check_finite

CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model"
"""Stem of the weight files that diffusers writes."""

_FIXED = {  # options of diffusers' `save_pretrained`, with the only value that the loaders here know
    "safe_serialization": (True, "weights are read from safetensors files only"),
    "variant": (None, "folders are read without variants; save each to a folder of its own"),
    "push_to_hub": (False, "save to a folder and send it with `hf upload`"),
    "use_flashpack": (False, "weights are read from safetensors files only"),
    "is_main_process": (True, "call it on one process only"),
    "save_function": (None, "weights are written by safetensors"),
}


def check_save_options(options: Mapping[str, Any], max_shard_size: int | str | None) -> None:
    """Raise `ValueError` for arguments of `save_pretrained` that would write what the loaders cannot read.

    Args:
        options: by name; diffusers' own defaults are fine.
        max_shard_size: bytes, or text such as "5GB".
    """
    for name, value in options.items():
        if name not in _FIXED:
            near = difflib.get_close_matches(name, ["max_shard_size", *_FIXED], 1)
            hint = f"; did you mean {near[0]!r}?" if near else "; expected max_shard_size or none"
            raise ValueError(f"save_pretrained got an unknown argument {name!r}{hint}")
        wanted, why = _FIXED[name]
        if value is not wanted:
            raise ValueError(f"save_pretrained cannot take {name}={value!r:.80}: {why}")
    fine = max_shard_size is None or (isinstance(max_shard_size, int) and not isinstance(max_shard_size, bool))
    if isinstance(max_shard_size, int) and max_shard_size < 1:
        fine = False
    if isinstance(max_shard_size, str):
        fine = re.fullmatch(r"(?=.*[1-9])\d{1,9}(\.\d+)?[KMGT]?B", max_shard_size, re.IGNORECASE) is not None
    if not fine:
        raise ValueError(f"max_shard_size is {max_shard_size!r}; expected a number of bytes, or text such as '5GB'")


def save_model(model: torch.nn.Module, folder: str | os.PathLike[str], write: Callable[[Path], None]) -> None:
    """Put what `write` writes for `model` into `folder`: complete, or not at all. Other files there stay.

    Args:
        write: writes `config.json` and weights into an empty folder.

    Raises:
        ValueError: `folder` is a file or holds a model of another class, or weights that no loader would take.
        OSError: a full or read-only disk; the message names the folder.
    """
    kind, folder = type(model).__name__, resolve_link(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{str(folder)!r} is a file; name a folder to save the {kind} in")
    held = _model_in(folder)
    if held not in (None, kind):
        raise ValueError(
            f"{str(folder)!r} holds a {plain(held)}, which would be lost; save the {kind} to another folder"
        )
    _check_weights(model, kind)
    with filling_folder(folder) as temporary:
        write(temporary)
        written = {file.name for file in temporary.iterdir()}
    for stale in folder.glob(f"{WEIGHTS}*"):  # of the model that was there
        if stale.name not in written and _is_weight_file(stale.name):
            stale.unlink()


def _is_weight_file(name: str) -> bool:
    return re.fullmatch(rf"{WEIGHTS}(-\d{{5}}-of-\d{{5}})?\.safetensors(\.index\.json)?", name) is not None


def _model_in(folder: Path) -> str | None:
    """The class of the model whose files would be overwritten; None without one."""
    if (folder / CONFIG).exists():
        try:
            return str(read_json(folder / CONFIG, "a config").get("_class_name", "model of another library"))
        except ValueError:
            return f"damaged {CONFIG}"
    return "weight file" if any(_is_weight_file(file.name) for file in folder.glob(f"{WEIGHTS}*")) else None


def _check_weights(model: torch.nn.Module, kind: str) -> None:
    for name, value in model.state_dict().items():
        if value.is_meta:
            raise ValueError(f"{kind}: {name} is on the meta device and has no values; load the weights first")
        if value.layout != torch.strided:
            raise ValueError(f"{kind}: {name} is sparse; call to_dense() on it before saving")
    check_finite(model, f"{kind}, which is to be saved")
