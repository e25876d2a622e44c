"""Folders of released families: recognised, with the tokenizers that lie beside the weights."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import Qwen2Tokenizer

from unidiff.errors import read_json
from unidiff.families.checkpoint.load import (
    IMAGE_PLACES,
    PIPELINE_PARTS,
    RECORD,
    find_config,
    load_released,
    read_config,
)
from unidiff.families.family import FAMILIES, fitting
from unidiff.families.layout import RowLayout
from unidiff.pipelines.settings import PipelineSettings
from unidiff.tokens import Vocabulary
from unidiff.tokens.image.latents import PictureLatents
from unidiff.tokens.image.vq import VQImageTokenizer
from unidiff.tokens.text import TextTokenizer

TEXT_PLACES = ("text_tokenizer", "tokenizer", ".")


def is_released(folder: Path) -> bool:
    """Whether a folder, or its denoiser's, holds a released denoiser or one that was converted."""
    parts = (folder, folder / PIPELINE_PARTS[0])
    if any((part / RECORD).is_file() for part in parts):
        return True
    return any(family.vocabulary is not None for part in parts for family in fitting(read_config(find_config(part))))


class LoadedParts(NamedTuple):
    """Everything a pipeline is made of, in the order of its arguments."""

    transformer: Any
    image_tokenizer: VQImageTokenizer | PictureLatents | None
    text_tokenizer: TextTokenizer
    settings: PipelineSettings | None = None
    layout: RowLayout | None = None


def load_released_parts(
    folder: Path,
    dtype: torch.dtype | None = None,
    image_tokenizer: str | Path | None = None,
    text_tokenizer: str | Path | None = None,
    vocabulary: Vocabulary | None = None,
) -> LoadedParts:
    """The parts of a released folder; `ValueError` for a family without a pipeline, other errors as of `load_released`.

    Args:
        dtype: of the network; None keeps the checkpoint's. vocabulary: as in `load_released`.
        image_tokenizer, text_tokenizer: as in `load_images` and `load_texts`.
    """
    released = load_released(folder, dtype, vocabulary=vocabulary)
    family = released.family
    if family.layout is None:
        others = ", ".join(name for name, other in FAMILIES.items() if other.layout is not None)
        raise ValueError(f"{family.name} has no pipeline (only {others}); load it with unidiff.families.load_released")
    images: Any
    if family.latents is not None:
        images = family.latents(folder if image_tokenizer is None else Path(image_tokenizer), released.model)
    elif family.image_tokenizer is None and image_tokenizer is not None:
        raise ValueError(f"{family.name} knows no pictures; leave image_tokenizer out")
    else:
        images = None if family.image_tokenizer is None else load_images(folder, image_tokenizer)
    texts = load_texts(folder, text_tokenizer)
    layout = family.layout(replace(released, folder=folder), texts)
    return LoadedParts(released.model, images, texts, layout=layout)


def load_texts(folder: Path, place: str | Path | None = None) -> TextTokenizer:
    """The text tokenizer at `place` (a folder or hub name), or at one of `TEXT_PLACES` beside the weights.

    Dream's folder names a class of its own, which is Qwen2's: that is used instead of the code in the folder.
    """
    found = place or next((folder / p for p in TEXT_PLACES if _has_text(folder / p)), None)
    if found is None:
        raise FileNotFoundError(f"{folder} has no text tokenizer; put it into {folder / 'text_tokenizer'}")
    settings = Path(found) / "tokenizer_config.json"
    if settings.is_file() and read_json(settings, "tokenizer settings").get("tokenizer_class") == "DreamTokenizer":
        load = partial(Qwen2Tokenizer.from_pretrained, str(found), local_files_only=True, trust_remote_code=False)
        return TextTokenizer.read(found, load)
    return TextTokenizer.from_pretrained(found)


def load_images(folder: Path, place: str | Path | None = None) -> VQImageTokenizer:
    """The image tokenizer at `place` (file or folder), or at one of `IMAGE_PLACES` beside the weights, in float32."""
    found = place or next((folder / p for p in IMAGE_PLACES if (folder / p).exists()), None)
    if found is None:
        raise FileNotFoundError(
            f"{folder} has no image tokenizer; put it into {folder / 'image_tokenizer'} (LlamaGen's also as "
            "vq_ds16_c2i.pt beside the weights) or give image_tokenizer="
        )
    images = load_released(found, torch.float32).images
    if images is None:
        raise ValueError(f"{found} is no image tokenizer; give LlamaGen's, MAGVIT-v2's or a VQModel's weights")
    return images


def _has_text(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"))
