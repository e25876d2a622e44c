"""Do the parts of a pipeline fit together? One clear sentence where they do not."""

from __future__ import annotations

import warnings

import torch

from unidiff.decoding import Guidance
from unidiff.families.checkpoint.load import Released
from unidiff.models.transformer import MaskedTransformer
from unidiff.pipelines.settings import PipelineSettings
from unidiff.tokens.image.vq import VQImageTokenizer
from unidiff.tokens.text import TextTokenizer

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def check_fit(
    transformer: MaskedTransformer, images: VQImageTokenizer, texts: TextTokenizer, settings: PipelineSettings
) -> None:
    """Raise `ValueError` unless vocabulary, transformer and tokenizers agree about the ids."""
    vocabulary = settings.vocabulary
    if transformer.config.vocab_size != vocabulary.size:
        raise ValueError(
            f"the transformer has {transformer.config.vocab_size} ids but the vocabulary {vocabulary.size}; "
            "give the tokenizers it was trained with"
        )
    if images.codebook_size != vocabulary.image_size:
        raise ValueError(
            f"the image tokenizer has {images.codebook_size} codes but the vocabulary {vocabulary.image_size}; "
            "give the tokenizer the model was trained with"
        )
    if texts.size != vocabulary.text_size:
        raise ValueError(
            f"the text tokenizer has {texts.size} ids but the vocabulary {vocabulary.text_size}; "
            "give the tokenizer the model was trained with"
        )
    known = texts.specials()
    if missing := [name for name in settings.task_tokens.values() if name not in known]:
        raise ValueError(f"the text tokenizer has no special token {missing[0]!r}; it has {sorted(known)}")


def check_released(released: Released, images: VQImageTokenizer | None, texts: TextTokenizer) -> None:
    """Raise `ValueError` unless the tokenizers have the ids of a released model."""
    vocabulary = released.vocabulary
    size = 0 if vocabulary is None else vocabulary.image_size
    if vocabulary is None or size != (0 if images is None else images.codebook_size):
        codes = "none" if images is None else images.codebook_size
        raise ValueError(
            f"the image tokenizer has {codes} codes, but the model {size}; give the one it was trained with"
        )
    fewest = vocabulary.text_size if released.family.name == "unidisc" else 0
    if not fewest <= texts.size <= vocabulary.text_size + 1:  # with or without [MASK]; others leave ids unused
        raise ValueError(
            f"the text tokenizer has {texts.size} ids, but the model {vocabulary.text_size}; give the one it was "
            "trained with"
        )


def check_negative(guidance: Guidance, hides: str | None, worded: bool) -> None:
    """Raises ValueError where a negative prompt would change nothing, or does not go with `guidance_hides`.

    Args:
        hides: what the caller asked guidance to hide. worded: some row has a negative prompt of words.
    """
    if hides is not None:
        raise ValueError(
            f"negative_prompt and guidance_hides={hides!r} both say what guidance leads away from; give one of them"
        )
    scale = guidance.scale if guidance.image_scale is None else guidance.image_scale
    check_strength(worded and scale == 1.0)


def check_strength(off: bool) -> None:
    """Raises ValueError where guidance is off, so that the words of a negative prompt would change nothing."""
    if off:
        raise ValueError("negative_prompt changes nothing at guidance_scale 1; choose a larger one")


def read_dtype(dtype: torch.dtype | str | None) -> torch.dtype:
    """A torch dtype from itself or its name; float32 for None."""
    if dtype is None:
        return torch.float32
    if isinstance(dtype, torch.dtype) and dtype in (*_DTYPES.values(), torch.float64):
        return dtype
    if isinstance(dtype, str) and dtype in _DTYPES:
        return _DTYPES[dtype]
    raise ValueError(f"dtype is {dtype!r:.80}; expected one of {', '.join(_DTYPES)}")


class UntrainedTask(UserWarning):
    """The model was never trained for what it is asked to do."""


def untrained_note(task: str, settings: PipelineSettings) -> list[str]:
    """Notes for a result of a task that the model was not trained for, also given as a warning, which shows once."""
    if task in settings.trained:
        return []
    others = ", ".join(settings.trained) or "nothing"
    note = f"the model was not trained for {task}, so the result is likely noise; it was trained for {others}"
    warnings.warn(note, UntrainedTask, stacklevel=4)
    return [note]
