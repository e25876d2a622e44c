"""Put a trained transformer and its two tokenizers together into one pipeline folder."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch

from unidiff.errors import read_json
from unidiff.models.trained_on import TrainedOn, read_trained_on
from unidiff.pipeline import UniDiffPipeline
from unidiff.pipelines.folder import check_transformer, load_transformer
from unidiff.pipelines.owned import INDEX, VOCABULARY, check_target, read_settings
from unidiff.pipelines.settings import LONGEST_ROW, TASKS, PipelineSettings
from unidiff.schema import check_value
from unidiff.tokens import Vocabulary
from unidiff.tokens.image.vq import VQImageTokenizer
from unidiff.tokens.text import TextTokenizer

TASK_TOKENS = ("eos", "caption", "question", "answer")
_TAUGHT = {  # what a training task teaches; with "generate" everything but questions and answers
    "generate": ("text_to_image", "caption", "inpaint", "generate"),
    "text_to_image": ("text_to_image", "inpaint"),
    "caption": ("caption",),
    "answer": ("answer",),
    "text": (),
}


def pack_pipeline(
    transformer: str | Path,
    image_tokenizer: str | Path,
    text_tokenizer: str | Path,
    out: str | Path,
    *,
    text_length: int | None = None,
    image_size: tuple[int, int] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    image_dtype: torch.dtype = torch.float32,
) -> UniDiffPipeline:
    """Load three folders strictly, check that they fit, and save one pipeline folder.

    Args:
        transformer: folder of a `MaskedTransformer`. Training notes there what its rows were; a pipeline that it is a part
            of knows it, too.
        image_tokenizer: folder of a `CellVQModel` or `VQModel`.
        text_tokenizer: folder of a text tokenizer with the specials eos, caption, question, answer.
        text_length, image_size: tokens of the text span, and (height, width) in pixels, that the transformer was trained
            with; needed where its folder does not say it.
        dtype: how the transformer is stored.
        image_dtype: how the image tokenizer is stored. Half precision moves codes: of the embedded tokenizer, float16
            weights changed one code in eleven, and the transformer knows only the ones it was trained on.

    Raises:
        FileNotFoundError: a folder is missing. OSError: a full or read-only disk.
        ValueError: parts that do not fit together, a text length or size other than that of training, or an `out` that
            holds anything else than a pipeline of ours.
    """
    check_target(out)
    check_value(text_length, int | None, "text_length")
    check_value(image_size, tuple[int, int] | None, "image_size")
    check_transformer(transformer)
    noted = _noted(Path(transformer))
    images = VQImageTokenizer.from_pretrained(image_tokenizer, image_dtype)
    texts = TextTokenizer.from_pretrained(text_tokenizer)
    before = noted if isinstance(noted, PipelineSettings) else None
    vocabulary = _vocabulary(texts, images, Path(transformer), None if before is None else before.vocabulary)
    length, grid = _rows(noted, text_length, image_size, images.factor, transformer)
    if before is not None:
        settings = replace(before, vocabulary=vocabulary)
    else:
        tasks = tasks_taught(noted.tasks) if isinstance(noted, TrainedOn) else None
        settings = PipelineSettings(vocabulary, length, grid, tasks=tasks)
    pipe = UniDiffPipeline(load_transformer(transformer, dtype), images, texts, settings)
    pipe.save_pretrained(out)
    return pipe


def settings_after(settings: PipelineSettings, transformer: str | Path) -> PipelineSettings:
    """Settings of a pipeline whose transformer was trained on: text length, grid and tasks as noted beside it.

    Args:
        settings: of the pipeline that training started from; what it could do before counts as well.
    """
    trained = read_trained_on(transformer)
    if trained is None:
        return settings
    tasks = None if settings.tasks is None else (*settings.tasks, *tasks_taught(trained.tasks))
    return replace(settings, text_length=trained.text_length, grid=trained.grid, tasks=tasks)


def tasks_taught(training: Iterable[str]) -> tuple[str, ...]:
    """Tasks of a pipeline that training tasks teach."""
    training = set(training)
    taught = {task for name in training for task in _TAUGHT[name]}
    if {"text", "text_to_image"} <= training:  # words from nothing, then their picture
        taught.add("generate")
    return tuple(task for task in TASKS if task in taught)


def _noted(transformer: Path) -> TrainedOn | PipelineSettings | None:
    """What the rows were, by the training's note or by the pipeline that the transformer is a part of."""
    place, found = transformer.resolve(), read_trained_on(transformer)
    if found is None and place.name == "transformer" and (place.parent / INDEX).is_file():
        return read_settings(place.parent)
    return found


def _rows(
    trained: TrainedOn | PipelineSettings | None,
    text_length: int | None,
    image_size: tuple[int, int] | None,
    factor: int,
    transformer: str | Path,
) -> tuple[int, tuple[int, int]]:
    """(text length, grid of codes): as trained, or as given where nobody noted it."""
    name = repr(str(transformer))
    if image_size is not None:
        height, width = image_size
        if min(image_size) < 1 or height % factor or width % factor:
            raise ValueError(f"image size {width}x{height} must be a positive multiple of the factor {factor}")
        if max(image_size) > LONGEST_ROW:
            raise ValueError(f"image size {width}x{height} is too large; no side is above {LONGEST_ROW}")
    if trained is None:
        if text_length is None or image_size is None:
            absent = ["text_length"] * (text_length is None) + ["image_size"] * (image_size is None)
            raise ValueError(f"{name} does not say what it was trained on; give {' and '.join(absent)} as in training")
        return text_length, (height // factor, width // factor)
    if text_length not in (None, trained.text_length):
        raise ValueError(
            f"text_length is {text_length}, but {name} was trained with {trained.text_length}; leave it out"
        )
    rows, columns = trained.grid
    if image_size not in (None, (rows * factor, columns * factor)):
        raise ValueError(
            f"image size is {width}x{height}, but {name} was trained on {columns * factor}x{rows * factor} pixels "
            f"({columns}x{rows} codes of {factor}); leave it out"
        )
    return trained.text_length, trained.grid


def _vocabulary(
    texts: TextTokenizer, images: VQImageTokenizer, transformer: Path, trained: Vocabulary | None
) -> Vocabulary:
    """The ids of both tokenizers; refused where a pipeline, or training's note beside the transformer, has others."""
    known = texts.specials()
    if absent := [name for name in TASK_TOKENS if name not in known]:
        raise ValueError(f"the text tokenizer has no special token {absent[0]!r}; it has {sorted(known)}")
    found = Vocabulary.unified(texts.size, images.codebook_size, {name: texts.special(name) for name in TASK_TOKENS})
    note = transformer / VOCABULARY
    if note.is_file():
        try:
            trained = Vocabulary.from_dict(read_json(note, "a vocabulary"))
        except ValueError as error:
            raise ValueError(f"{str(note)!r} is damaged ({error}); export the model again") from error
    if trained is None:
        return found
    ids = {name: trained.text[0] + texts.special(name) for name in TASK_TOKENS}
    for what, ours, theirs in (
        ("text ids", texts.size, trained.text_size),
        ("image codes", images.codebook_size, trained.image_size),
        *((f"as id of {name!r}", ids[name], trained.specials.get(name, ids[name])) for name in TASK_TOKENS),
    ):
        if ours != theirs:
            fault = f"the tokenizers have {ours} {what}, but {str(transformer)!r} was trained with {theirs}"
            raise ValueError(f"{fault}; give the tokenizers that encoded its data")
    return replace(trained, specials={**trained.specials, **ids})
