"""Put a trained transformer and its two tokenizers together into one pipeline folder."""

from __future__ import annotations

from pathlib import Path

import torch

from unidiff.pipeline import UniDiffPipeline
from unidiff.pipelines.folder import load_transformer
from unidiff.pipelines.settings import PipelineSettings
from unidiff.tokens import Vocabulary
from unidiff.tokens.image_vq import VQImageTokenizer
from unidiff.tokens.text import TextTokenizer

TASK_TOKENS = ("eos", "caption", "question", "answer")


def pack_pipeline(
    transformer: str | Path,
    image_tokenizer: str | Path,
    text_tokenizer: str | Path,
    out: str | Path,
    *,
    text_length: int = 24,
    image_size: tuple[int, int] = (64, 64),
    dtype: torch.dtype = torch.bfloat16,
    image_dtype: torch.dtype = torch.float32,
) -> UniDiffPipeline:
    """Load three folders strictly, check that they fit, and save one pipeline folder.

    Args:
        transformer: folder of a `MaskedTransformer`.
        image_tokenizer: folder of a `CellVQModel` or `VQModel`.
        text_tokenizer: folder of a text tokenizer with the specials eos, caption, question, answer.
        out: the pipeline folder to write.
        text_length: tokens of the text span the transformer was trained with.
        image_size: (height, width) in pixels.
        dtype: how the transformer is stored.
        image_dtype: how the image tokenizer is stored. Half precision moves codes: of the embedded tokenizer, float16
            weights changed one code in eleven, and the transformer knows only the ones it was trained on.

    Raises:
        FileNotFoundError: a folder is missing.
        ValueError: parts that do not fit together.
    """
    images = VQImageTokenizer.from_pretrained(image_tokenizer, image_dtype)
    texts = TextTokenizer.from_pretrained(text_tokenizer)
    specials = {name: texts.special(name) for name in TASK_TOKENS}
    if any(side % images.factor for side in image_size):
        raise ValueError(f"image size {image_size[1]}x{image_size[0]} must be a multiple of the factor {images.factor}")
    settings = PipelineSettings(
        Vocabulary.unified(texts.size, images.codebook_size, specials),
        text_length,
        (image_size[0] // images.factor, image_size[1] // images.factor),
    )
    pipe = UniDiffPipeline(load_transformer(transformer, dtype), images, texts, settings)
    pipe.save_pretrained(out)
    return pipe
