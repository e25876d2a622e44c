"""`convert`: a released checkpoint to unidiff's own folder, and back to the released layout with the same bytes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor

from unidiff.files import replacing_folder
from unidiff.released.loading import PIPELINE_PARTS, Released, load_released
from unidiff.released.native import CONSTANTS, RECORD, Record
from unidiff.tokens.vocabulary import Vocabulary

SHARD_SIZE = "5GB"


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
        target: a new or empty folder; it appears complete or not at all.
        dtype: cast the floating-point weights; None keeps every byte.
        family, vocabulary, subfolder: as in `load_released`.

    Returns:
        One sentence about what was written.

    Raises:
        FileNotFoundError, ValueError: as `load_released`; a target that is not empty.
    """
    source, target = Path(source) if Path(source).exists() else source, Path(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} is not an empty folder; name a new one")
    root = Path(source) / subfolder if subfolder is not None else Path(source)
    part = next((p for p in PIPELINE_PARTS if (root / p / "config.json").is_file()), None)
    if not root.is_dir() or (root / "config.json").is_file() or part is None:
        released = load_released(source, dtype, family=family, vocabulary=vocabulary, subfolder=subfolder)
        back = root.is_dir() and (root / RECORD).is_file()
        with replacing_folder(target) as folder:
            _write(released, folder, back)
        return _sentence(released, target, back)
    back = (root / part / RECORD).is_file()
    released = load_released(root / part, dtype, family=family, vocabulary=vocabulary)
    with replacing_folder(target) as folder:
        shutil.copytree(root, folder, dirs_exist_ok=True, ignore=lambda at, names: [part] if Path(at) == root else [])
        (folder / part).mkdir()
        _write(released, folder / part, back)
    return _sentence(released, target, back)


def save_native(released: Released, folder: str | Path) -> None:
    """Write unidiff's folder: the model as `save_pretrained` does, and the record of its origin."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model: Any = released.model
    model.save_pretrained(folder)
    if released.constants:
        save_file({name: value.contiguous() for name, value in released.constants.items()}, folder / CONSTANTS)
    record = Record(
        released.family.name,
        released.config,
        released.layout,
        released.vocabulary,
        CONSTANTS if released.constants else None,
    )
    (folder / RECORD).write_text(record.to_json(), encoding="utf-8")


def save_released(released: Released, folder: str | Path) -> None:
    """Write the released layout: `config.json` and safetensors, sharded above 5 GB."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if released.config:
        (folder / "config.json").write_text(json.dumps(released.config, indent=2) + "\n", encoding="utf-8")
    save_shards(released.state_dict(), folder, "model" if _in_transformers(released) else "diffusion_pytorch_model")


def save_shards(state: dict[str, Tensor], folder: Path, stem: str, shard_size: str = SHARD_SIZE) -> None:
    """Named weights as safetensors files with an index where there are several."""
    pattern = stem + "{suffix}.safetensors"
    split = split_torch_state_dict_into_shards(state, filename_pattern=pattern, max_shard_size=shard_size)
    for file, names in split.filename_to_tensors.items():
        save_file({name: state[name].contiguous() for name in names}, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write(released: Released, folder: Path, back: bool) -> None:
    (save_released if back else save_native)(released, folder)


def _in_transformers(released: Released) -> bool:
    return not str(released.config.get("_class_name", "")).endswith(("Transformer2DModel", "VQModel"))


def _sentence(released: Released, target: Path, back: bool) -> str:
    layout = "the released layout" if back else "unidiff's layout"
    return f"{target}: {released.family.name} in {layout}"
