"""Checkpoints without pickle: safetensors and JSON in a folder that appears by one rename; a `latest` pointer after it.

<run>/checkpoints/step-00001000/{model,ema,optimiser}.safetensors  state.json
<run>/checkpoints/latest        the name of the newest complete folder
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from unidiff.files import flush_to_disk, replacing, replacing_folder

_PARTS = ("model", "ema", "optimiser")


@dataclass(frozen=True)
class Checkpoint:
    """Everything a run continues from. `state` is plain data: step, samples, EMA updates, bad steps, config."""

    model: dict[str, Tensor]
    ema: dict[str, Tensor]
    optimiser: dict[str, Tensor]
    state: dict[str, Any]


def write_atomic(path: Path, text: str) -> None:
    """Write a small text file under a temporary name and rename it."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def save_checkpoint(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write `folder/step-N`, point `latest` at it, and delete all but the `keep` newest. Returns the new folder.

    A process killed anywhere in here leaves the previous checkpoint in charge.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name = f"step-{checkpoint.state['step']:08d}"
    if latest_name(folder) == name:  # SIGTERM right after a regular save: it is on disk already
        return folder / name
    final = folder / name
    with replacing_folder(final) as temporary:
        for part in _PARTS:
            tensors = {k: v.detach().cpu().contiguous() for k, v in getattr(checkpoint, part).items()}
            save_file(tensors, temporary / f"{part}.safetensors")
            flush_to_disk(temporary / f"{part}.safetensors")
        write_atomic(temporary / "state.json", json.dumps(checkpoint.state, indent=1))
    flush_to_disk(folder)
    write_atomic(folder / "latest", name + "\n")
    for old in sorted(folder.glob("step-*"))[:-keep]:
        if old.name != name:
            shutil.rmtree(old, ignore_errors=True)
    for stray in folder.glob(".step-*.tmp"):
        shutil.rmtree(stray, ignore_errors=True)
    return final


def latest_name(folder: Path) -> str | None:
    """The folder name that `latest` holds, or None."""
    pointer = folder / "latest"
    return pointer.read_text(encoding="utf-8").strip() if pointer.is_file() else None


def load_checkpoint(folder: Path) -> Checkpoint | None:
    """The checkpoint that `latest` names, or None when there is none.

    Raises:
        ValueError: `latest` names a folder that is missing or incomplete.
    """
    name = latest_name(folder)
    if name is None:
        return None
    target = folder / name
    missing = [p for p in (*(f"{p}.safetensors" for p in _PARTS), "state.json") if not (target / p).is_file()]
    if missing:
        raise ValueError(f"checkpoint {target} lacks {', '.join(missing)}; point {folder / 'latest'} at a complete one")
    tensors = {part: load_file(target / f"{part}.safetensors") for part in _PARTS}
    return Checkpoint(**tensors, state=json.loads((target / "state.json").read_text(encoding="utf-8")))
