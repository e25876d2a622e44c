"""Pipeline folders: reading them strictly, writing them whole. Finding them is `unidiff.hub`."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from unidiff.files import replacing_folder
from unidiff.models.transformer import MaskedTransformer
from unidiff.pipelines.settings import PipelineSettings
from unidiff.tokens.image_vq import VQImageTokenizer
from unidiff.tokens.text import TextTokenizer

INDEX = "model_index.json"
PIPELINE_CLASS = "UniDiffPipeline"
_ORIGINS = ("_name_or_path", "name_or_path", "is_local", "local_files_only")


@dataclass(frozen=True)
class LoadedParts:
    """Everything a pipeline is made of."""

    transformer: MaskedTransformer
    image_tokenizer: VQImageTokenizer
    text_tokenizer: TextTokenizer
    settings: PipelineSettings


def load_parts(folder: Path, dtype: torch.dtype) -> LoadedParts:
    """Read a pipeline folder; any doubt about it is an error.

    Raises:
        FileNotFoundError: a part is missing.
        ValueError: a pipeline of another family, unknown settings, weights that are missing, unexpected, misshaped or
            NaN, or parts that do not fit together.
    """
    index = read_index(folder)
    settings = PipelineSettings.from_dict(index.get("settings") or {})
    transformer = load_transformer(folder / "transformer", dtype)
    # Never in half precision: rounded weights move codes, and the transformer knows only those it was trained on.
    image_tokenizer = VQImageTokenizer.from_pretrained(folder / "image_tokenizer")
    text_tokenizer = TextTokenizer.from_pretrained(folder / "text_tokenizer")
    return LoadedParts(transformer, image_tokenizer, text_tokenizer, settings)


def load_transformer(folder: str | Path, dtype: torch.dtype = torch.float32) -> MaskedTransformer:
    """A `MaskedTransformer` folder in evaluation mode; never looked up on the network."""
    if not (Path(folder) / "config.json").is_file():
        raise FileNotFoundError(f"{str(folder)!r} holds no config.json; name a folder with a saved MaskedTransformer")
    return MaskedTransformer.from_pretrained(str(folder), torch_dtype=dtype).eval()


def is_pipeline(folder: Path) -> bool:
    """Whether a folder holds a unidiff pipeline, by the class that its index names."""
    path = folder / INDEX
    return path.is_file() and f'"{PIPELINE_CLASS}"' in path.read_text(encoding="utf-8", errors="replace")


def read_index(folder: Path) -> dict[str, Any]:
    """`model_index.json` of a unidiff pipeline."""
    path = folder / INDEX
    if not path.is_file():
        raise FileNotFoundError(f"{str(folder)!r} holds no {INDEX}; name a folder written by save_pretrained")
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error}); the file is damaged") from error
    family = index.get("_class_name") if isinstance(index, dict) else None
    if family != PIPELINE_CLASS:
        raise ValueError(f"{path} describes a {family}, not a {PIPELINE_CLASS}; load it with its own library")
    return index


def forget_origins(folder: Path) -> None:
    """Drop the paths that diffusers and transformers note in configs: a model must not name its maker's machine."""
    for path in sorted(folder.rglob("*config.json")):
        config = json.loads(path.read_text(encoding="utf-8"))
        kept = {key: value for key, value in config.items() if key not in _ORIGINS}
        if kept != config:
            path.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_folder(target: str | Path, write: Callable[[Path], None]) -> None:
    """Call `write` on an empty folder beside `target`, then put it in place; `target` is never half-written.

    Raises:
        ValueError: `target` is a file, or a folder that holds something else than a pipeline.
    """
    target = Path(target)
    if target.exists() and not target.is_dir():
        raise ValueError(f"{str(target)!r} is a file; name a folder to save the pipeline in")
    if target.is_dir() and any(target.iterdir()) and not (target / INDEX).is_file():
        raise ValueError(f"{str(target)!r} is not empty and holds no pipeline; save to a new folder")
    with replacing_folder(target) as temporary:
        write(temporary)
