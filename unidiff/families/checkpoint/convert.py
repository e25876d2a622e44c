"""`convert`: a released checkpoint to unidiff's own folder, and back to the released layout with the same bytes."""

from __future__ import annotations

import errno
import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor

from unidiff.families.checkpoint.load import CONSTANTS, RECORD, Record, find_part, load_released
from unidiff.families.family import Released
from unidiff.files import replacing_folder, resolve_link
from unidiff.hub import RELEASED, locate
from unidiff.tokens import Vocabulary

SHARD_SIZE = "5GB"
_DIFFUSERS = ("Transformer2DModel", "VQModel", "SD3JointModelFlexible")  # ends of class names


def convert(
    source: str | Path,
    target: str | Path,
    dtype: torch.dtype | None = None,
    *,
    family: str | None = None,
    vocabulary: Vocabulary | None = None,
    subfolder: str | None = None,
) -> str:
    """Write `source` in the other layout: released to unidiff's, a converted folder back to the released one.

    Of a diffusers pipeline folder (Muddit), the `transformer` is converted and everything else copied as it is.

    Args:
        source: a file, folder or hub name that `load_released` reads, or a folder that this function wrote.
        target: a new or empty folder outside of `source`; it appears complete or not at all.
        dtype: cast the floating-point weights; None keeps every byte.
        family, vocabulary, subfolder: as in `load_released`.

    Returns one sentence about what was written.

    Raises:
        FileNotFoundError, ValueError: as `load_released`; a target that is not empty, or links that lead nowhere.
        OSError: a full or read-only disk; the message names the target.
    """
    place = Path(target)
    _check_empty(place)
    root = Path(source) if Path(source).is_file() else locate(source, RELEASED)
    if root.is_dir() and _is_above(root.resolve(), place.resolve()):  # it would be copied into itself
        raise ValueError(f"{place} lies inside of {root}, which is to be converted; name a folder elsewhere")
    held = find_part(root, subfolder)
    root = root / (subfolder or "")
    released = load_released(held, dtype, family=family, vocabulary=vocabulary)
    back = (held / RECORD).is_file()
    with replacing_folder(place) as folder:
        if held != root:
            _copy_others(root, folder, held.name)
            folder = folder / held.name
            folder.mkdir()
        (save_released if back else save_converted)(released, folder)
        _check_empty(place)  # a large model takes minutes to write
    layout = "the released layout" if back else "unidiff's layout"
    return f"{place}: {released.family.name} in {layout}"


def _check_empty(target: Path) -> None:
    place = resolve_link(target)
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise ValueError(f"{target} is not an empty folder; name a new one")


def _is_above(one: Path, other: Path) -> bool:
    return one == other or one in other.parents


def _copy_others(root: Path, folder: Path, part: str) -> None:
    """Everything in `root` but `part`; links are followed, and refused where they lead nowhere or round in circles."""
    for path in sorted(root.rglob("*")):
        if path.is_symlink() and not path.exists():
            raise ValueError(f"{path} is a link that leads nowhere; mend or remove it")
        if path.is_symlink() and path.is_dir() and _is_above(path.resolve(), path.parent.resolve()):
            raise ValueError(f"{path} is a link to a folder that holds it; remove it")
        if not (path.is_file() or path.is_dir()):
            raise ValueError(f"{path} is neither a file nor a folder; remove it")
    try:
        shutil.copytree(root, folder, dirs_exist_ok=True, ignore=lambda at, _: [part] if Path(at) == root else [])
    except shutil.Error as error:  # a list of (from, to, reason)
        origin, copy, reason = error.args[0][0]
        for number in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS):
            if os.strerror(number) in str(reason):
                raise OSError(number, os.strerror(number), copy) from error
        raise ValueError(f"{origin} cannot be copied ({reason})") from error


def save_converted(released: Released, folder: Path) -> None:
    """Write the model as `save_pretrained` does, and the record of its origin, into an empty folder."""
    model: Any = released.model
    model.save_pretrained(folder)
    if kept := released.kept():
        save_file({name: value.contiguous() for name, value in kept.items()}, folder / CONSTANTS)
    ids = None if released.vocabulary is None else released.vocabulary.to_dict()
    constants = CONSTANTS if kept else None
    record = Record(released.family.name, released.config, released.spelling, constants=constants)
    content = json.dumps({**asdict(record), "vocabulary": ids}, indent=2, sort_keys=True)
    (folder / RECORD).write_text(content + "\n", encoding="utf-8")


def save_released(released: Released, folder: Path) -> None:
    """Write the released layout into an empty folder: `config.json` and safetensors, sharded above 5 GB."""
    apart = {name: released.config[name] for name in released.family.sections if name in released.config}
    files = {"config": {name: value for name, value in released.config.items() if name not in apart}, **apart}
    for name, content in files.items() if released.config else ():
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    diffusers = str(released.config.get("_class_name", "")).endswith(_DIFFUSERS)
    save_shards(released.state_dict(), folder, "diffusion_pytorch_model" if diffusers else "model")


def save_shards(state: dict[str, Tensor], folder: Path, stem: str, shard_size: str = SHARD_SIZE) -> None:
    """Named weights as safetensors files with an index where there are several."""
    pattern = stem + "{suffix}.safetensors"
    split = split_torch_state_dict_into_shards(state, filename_pattern=pattern, max_shard_size=shard_size)
    for file, names in split.filename_to_tensors.items():
        save_file({name: state[name].contiguous() for name in names}, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
