"""Reading one released weight file: safetensors, or a torch file without running any code that it may carry."""

from __future__ import annotations

import argparse
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
TORCH_MAGIC = (b"PK\x03\x04", b"\x80\x02")  # zip archive; the older bare pickle
FOLDER_NAMES = ("model.safetensors", "diffusion_pytorch_model.safetensors", "pytorch_model.bin")


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The content of a weight file, on the CPU.

    Args:
        path: a `.safetensors`, `.pt`, `.pth`, `.bin` or `.ckpt` file, or a folder that holds `model.safetensors`,
            `diffusion_pytorch_model.safetensors` or `pytorch_model.bin`.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: another suffix, a truncated or damaged file, a torch file with other things than tensors and plain
            data (it could run code), or one that holds no mapping.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in FOLDER_NAMES if (path / name).is_file()]
        if not found:
            raise FileNotFoundError(f"{path} holds none of {', '.join(FOLDER_NAMES)}; name the weight file itself")
        path = found[0]
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; name a released weight file")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged or no safetensors file ({error}); download it again") from error
    if path.suffix not in TORCH_SUFFIXES:
        raise ValueError(f"{path} has suffix {path.suffix!r}; expected .safetensors or one of {TORCH_SUFFIXES}")
    return _read_torch(path)


def _read_torch(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        if not file.read(4).startswith(TORCH_MAGIC):
            raise ValueError(f"{path} is no torch file (a web page or a pointer to it, perhaps); download it again")
    try:
        # training scripts save their command line next to the weights; the class only holds attributes
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than tensors and plain data, and reading that could run code; "
            "convert it to safetensors where you trust it"
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{path} is damaged; download it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; expected named weights")
    return content


def pick_entry(content: Mapping[str, Any], entry: str | None, order: Sequence[str]) -> Mapping[str, Any]:
    """The weights inside a checkpoint that may nest them.

    Args:
        content: names to weights, or entries to such mappings.
        entry: the entry to take; None for the first of `order` that is there, or `content` itself without any.

    Raises:
        ValueError: `entry` is not there.
    """
    there = [name for name, value in content.items() if isinstance(value, Mapping)]
    if entry is not None:
        if entry not in there:
            raise ValueError(f"the checkpoint has no entry {entry!r}; it has {sorted(there) or 'bare weights'}")
        return content[entry]
    return next((content[name] for name in order if name in there), content)
