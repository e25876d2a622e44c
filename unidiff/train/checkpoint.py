"""Checkpoints without pickle: safetensors and JSON in a folder that appears by one rename; a `latest` pointer after it.

<run>/checkpoints/step-00001000/{model,ema,optimiser}.safetensors  state.json   written by one process
<run>/checkpoints/step-00001000/shards/*.safetensors               state.json   by several (see `unidiff.train.shards`)
<run>/checkpoints/latest, best  names of the newest complete folder, and of the one with the best validation

Either kind can be continued by any number of processes.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from unidiff.files import flush_to_disk, replacing, replacing_folder

PARTS = ("model", "ema", "optimiser")


@dataclass(frozen=True)
class Checkpoint:
    """Everything a run continues from.

    `state` is plain data: step, samples (the position in the data, from which all noise is keyed), EMA updates, bad steps,
    config; `score`, the number that `best` compares, where a validation happened at this very step.
    """

    model: dict[str, Tensor]
    ema: dict[str, Tensor]
    optimiser: dict[str, Tensor]
    state: dict[str, Any]


def write_atomic(path: Path, text: str) -> None:
    """Write a small text file under a temporary name and rename it."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def step_name(step: int) -> str:
    """Folder name of a checkpoint."""
    return f"step-{step:08d}"


def save_checkpoint(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write `folder/step-N`, point `latest` at it, and delete all but the `keep` newest and the best. Returns the new folder.

    A process killed anywhere in here leaves the previous checkpoint in charge.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name = step_name(checkpoint.state["step"])
    if latest_name(folder) == name:  # SIGTERM right after a regular save: it is on disk already
        return folder / name
    with replacing_folder(folder / name) as temporary:
        for part in PARTS:
            tensors = {k: v.detach().cpu().contiguous() for k, v in getattr(checkpoint, part).items()}
            save_file(tensors, temporary / f"{part}.safetensors")
            flush_to_disk(temporary / f"{part}.safetensors")
        write_atomic(temporary / "state.json", json.dumps(checkpoint.state, indent=1))
    publish(folder, name, keep)
    return folder / name


def publish(folder: Path, name: str, keep: int) -> None:
    """Let the complete folder `name` be the newest: pointers, then the deletion of what is no longer kept."""
    flush_to_disk(folder)
    if score_of(folder, name) < score_of(folder, pointed_name(folder, "best")):
        write_atomic(folder / "best", name + "\n")
    write_atomic(folder / "latest", name + "\n")
    kept = {name, pointed_name(folder, "best"), *(p.name for p in sorted(folder.glob("step-*"))[-keep:])}
    strays = [p for end in ("tmp", "old") for p in folder.glob(f".step-*.{end}")]
    for old in (*(p for p in folder.glob("step-*") if p.name not in kept), *strays):
        shutil.rmtree(old, ignore_errors=True)


def pointed_name(folder: Path, pointer: str) -> str | None:
    """The folder name that the file `pointer` (`latest` or `best`) holds, or None."""
    path = folder / pointer
    return path.read_text(encoding="utf-8").strip() if path.is_file() else None


def latest_name(folder: Path) -> str | None:
    """The folder name that `latest` holds, or None."""
    return pointed_name(folder, "latest")


def score_of(folder: Path, name: str | None) -> float:
    """The validation number saved with a checkpoint; infinity where there is none."""
    path = folder / (name or "") / "state.json"
    return json.loads(path.read_text(encoding="utf-8")).get("score", math.inf) if name and path.is_file() else math.inf


def load_checkpoint(folder: Path) -> Checkpoint | None:
    """The checkpoint that `latest` names, written by one process, or None when there is none.

    Raises:
        ValueError: `latest` names a folder that is missing or incomplete.
    """
    name = latest_name(folder)
    if name is None:
        return None
    target = folder / name
    state = read_state(folder, name, [f"{p}.safetensors" for p in PARTS])
    return Checkpoint(**{part: load_file(target / f"{part}.safetensors") for part in PARTS}, state=state)


def read_state(folder: Path, name: str, needed: list[str]) -> dict[str, Any]:
    """`state.json` of a checkpoint. Raises ValueError when it or one of the `needed` files is not there."""
    target = folder / name
    missing = [p for p in (*needed, "state.json") if not (target / p).exists()]
    if missing:
        raise ValueError(f"checkpoint {target} lacks {', '.join(missing)}; point {folder / 'latest'} at a complete one")
    return json.loads((target / "state.json").read_text(encoding="utf-8"))
