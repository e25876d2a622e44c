"""Settings of a run that starts from a finished model: its architecture, its weights, its tokenizers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from unidiff.errors import read_json, reading
from unidiff.schema import check_value
from unidiff.tokens import Vocabulary
from unidiff.train.config import TokenizerConfig, TrainConfig
from unidiff.train.data.source import TokenSource

WEIGHTS = "transformer"  # part of a pipeline folder
LOOSE = ("attention", "block_length", "dropout")  # what may differ from the base: it changes no weight's shape


@dataclass(frozen=True)
class BaseModel:
    """A finished model on disk.

    Attributes:
        folder: a pipeline folder, or one with a `MaskedTransformer` alone.
        weights: where its transformer is.
        settings: the transformer's arguments, without `vocab_size`.
        vocab_size: rows of its embedding.
        pipeline: whether tokenizers come with it.
    """

    folder: Path
    weights: Path
    settings: Mapping[str, Any]
    vocab_size: int
    pipeline: bool


def open_base(folder: Path) -> BaseModel:
    """Read what a folder holds.

    Raises:
        FileNotFoundError: no transformer in it.
        ValueError: a damaged config, or a model of another class.
    """
    pipeline = (folder / "model_index.json").is_file()
    weights = folder / WEIGHTS if pipeline else folder
    path = weights / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{str(folder)!r} holds neither a pipeline nor a transformer; name a folder with one")
    config = read_json(path, "the config of a transformer")
    if config.get("_class_name") != "MaskedTransformer":
        raise ValueError(
            f"{path} describes a {config.get('_class_name')!r}; only MaskedTransformer models can be fine-tuned here"
        )
    settings = {key: value for key, value in config.items() if not key.startswith("_")}
    size = settings.pop("vocab_size", None)
    check_value(size, int, f"{path}: vocab_size")
    return BaseModel(folder, weights, settings, size, pipeline)


def finetune_config(base: BaseModel, config: TrainConfig) -> TrainConfig:
    """`config` with the base's architecture, weights and tokenizers filled in; `config.model` may change `LOOSE` settings.

    Raises:
        ValueError: `config.model` contradicts the base, or names other weights to start from.
    """
    for key, value in config.model.items():
        if key not in LOOSE and base.settings.get(key, value) != value:
            raise ValueError(
                f"model.{key} = {value!r}, but {str(base.folder)!r} has {base.settings[key]!r}; leave it out"
            )
    if config.checkpoint.init_from not in ("", str(base.weights)):
        raise ValueError(
            f"checkpoint.init_from = {config.checkpoint.init_from!r}; the model to start from is named first"
        )
    tokenizer = config.tokenizer
    if base.pipeline:
        image = tokenizer.image or str(base.folder / "image_tokenizer")
        text = tokenizer.text or str(base.folder / "text_tokenizer")
        tokenizer = TokenizerConfig(image, text)
    settings = {k: v for k, v in {**base.settings, **config.model}.items() if v is not None}
    checkpoint = replace(config.checkpoint, init_from=str(base.weights))
    return replace(config, model=settings, tokenizer=tokenizer, checkpoint=checkpoint)


def check_start(init_from: str, source: TokenSource) -> None:
    """Raise ValueError where the starting weights' folder says that its ids mean something else than the data's."""
    path = Path(init_from) / "vocabulary.json"
    if not init_from or not path.is_file():
        return
    with reading(path, "a vocabulary"):
        start = Vocabulary.from_dict(read_json(path))
    data = source.vocabulary
    same = (start.size, start.text, start.image, start.mask_id, start.image_mask) == (
        data.size, data.text, data.image, data.mask_id, data.image_mask,
    )  # fmt: skip
    if not same or any(data.specials.get(name, number) != number for name, number in start.specials.items()):
        raise ValueError(
            f"{str(path)!r} is another vocabulary than the data's; encode the data with the tokenizers of these weights"
        )


def check_vocabulary(base: BaseModel, source: TokenSource, vocabulary: Vocabulary | None) -> None:
    """Raise ValueError where the data's ids are not the model's.

    Args:
        vocabulary: of the base, where it says; only its size is known otherwise.
    """
    found = source.vocabulary
    if found.size != base.vocab_size:
        raise ValueError(
            f"the data has {found.size} ids, the model {base.vocab_size}; encode it with the model's tokenizers"
        )
    if vocabulary is not None and (found.text, found.image, found.mask_id) != (
        vocabulary.text, vocabulary.image, vocabulary.mask_id,
    ):  # fmt: skip
        raise ValueError(
            f"the data has text ids {found.text}, image ids {found.image} and [MASK] {found.mask_id}; the model "
            f"{vocabulary.text}, {vocabulary.image} and {vocabulary.mask_id}; encode the data with the model's tokenizers"
        )
