"""Folders of released models as pipelines: recognised, with the tokenizers that lie beside the weights."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2Tokenizer

from unidiff.errors import read_json
from unidiff.families.checkpoint.load import PIPELINE_PARTS, find_config, load_released, read_config
from unidiff.families.checkpoint.own import RECORD
from unidiff.families.registry import fitting
from unidiff.pipelines.muddit import MudditPipeline
from unidiff.pipelines.released import ReleasedPipeline
from unidiff.pipelines.released_tasks import check_family, tasks_of
from unidiff.tokens.image.vq import VQImageTokenizer
from unidiff.tokens.text import TextTokenizer
from unidiff.tokens.vocabulary import Vocabulary

IMAGE_PLACES = ("image_tokenizer", "vqvae", "magvitv2", "vq_ds16_c2i.pt", "vq_ds8_c2i.pt")
TEXT_PLACES = ("text_tokenizer", "tokenizer", ".")


def is_released(folder: Path) -> bool:
    """Whether a folder, or a part of it, holds a released denoiser or one that was converted."""
    for part in (folder, *(folder / name for name in PIPELINE_PARTS[:1])):
        if (part / RECORD).is_file():
            return True
        config = read_config(find_config(part))
        if any(family.vocabulary is not None for family in fitting(config)):
            return True
    return False


def load_released_pipeline(
    folder: Path,
    dtype: torch.dtype | None = None,
    *,
    image_tokenizer: str | Path | None = None,
    text_tokenizer: str | Path | None = None,
    vocabulary: Vocabulary | None = None,
) -> Any:
    """A released folder as an object with task methods: `MudditPipeline` for MM-DiTs, else `ReleasedPipeline`.

    Args:
        folder: the checkpoint. Tokenizers are looked for beside the weights: `IMAGE_PLACES`, `TEXT_PLACES`.
        dtype: of the network; None keeps the checkpoint's.
        vocabulary: as in `load_released`.
        image_tokenizer: file or folder of LlamaGen's, MAGVIT-v2's or a VQModel's weights; text_tokenizer: folder or hub name.

    Raises:
        FileNotFoundError: a part is missing.
        ValueError: a family without a pipeline, or parts that do not fit together.
    """
    if (folder / "transformer").is_dir() and (folder / "text_encoder").is_dir():
        return MudditPipeline.from_folder(folder, dtype)
    released = load_released(folder, dtype, vocabulary=vocabulary)
    check_family(released)
    if released.family.image_tokenizer is not None:
        images = load_images(folder, image_tokenizer)
    elif image_tokenizer is None:
        images = None
    else:
        raise ValueError(f"{released.family.name} knows no pictures; leave image_tokenizer out")
    texts = load_texts(folder, text_tokenizer)
    return ReleasedPipeline(released, tasks_of(released, texts), images, texts)


def load_texts(folder: Path, place: str | Path | None = None) -> TextTokenizer:
    """The text tokenizer at `place` (a folder or hub name), or at one of `TEXT_PLACES` beside the weights.

    Dream's folder names a class of its own, which is Qwen2's: that is used instead of the code in the folder.

    Raises:
        FileNotFoundError: none there.
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
    """The image tokenizer at `place`, or at one of `IMAGE_PLACES` beside the weights, in float32.

    Raises:
        FileNotFoundError: none there. ValueError: not an image tokenizer.
    """
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
