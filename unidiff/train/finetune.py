"""A run that starts from a finished model: its architecture, its weights, its tokenizers; and the pipeline that it gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unidiff.errors import read_json
from unidiff.schema import check_value
from unidiff.train.build import check_ids
from unidiff.train.config import TokenizerConfig, TrainConfig
from unidiff.train.data.source import TokenSource

if TYPE_CHECKING:
    from unidiff.pipelines.settings import PipelineSettings

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


def finetune(folder: Path, config: TrainConfig, environment: Mapping[str, str]) -> int:
    """Train the model in `folder` on, as `unidiff.train.run.startup.train` does, and save it as a pipeline again.

    All that can be wrong with the pipeline is said before hours of training.
    """
    from unidiff.pipelines.folder import check_target, load_tokenizers, read_index
    from unidiff.pipelines.settings import PipelineSettings
    from unidiff.train.run.startup import train

    base, output = open_base(folder), Path(config.output)
    config = finetune_config(base, config)

    def check_size(source: TokenSource) -> None:
        if source.vocabulary.size != base.vocab_size:
            size = source.vocabulary.size
            raise ValueError(
                f"the data has {size} ids, the model {base.vocab_size}; encode it with the model's tokenizers"
            )

    if not base.pipeline:
        return train(config, environment, check_size)
    settings = PipelineSettings.from_dict(read_index(folder).get("settings") or {})
    check_target(output / "pipeline")
    tokenizers = load_tokenizers(folder)

    def check(source: TokenSource) -> None:
        check_size(source)
        check_ids(settings.vocabulary, source, f"{str(folder)!r} has")

    def finish() -> None:
        save_pipeline(settings, tokenizers, output, config.checkpoint.export_dtype)

    return train(config, environment, check, finish)


def save_pipeline(settings: PipelineSettings, tokenizers: tuple[Any, Any], output: Path, dtype: str) -> None:
    """`output/pipeline`: the tokenizers and settings of a pipeline with the weights of `output/model`."""
    import torch

    from unidiff.pipeline import UniDiffPipeline
    from unidiff.pipelines.folder import load_transformer
    from unidiff.pipelines.options import DecodeOptions
    from unidiff.pipelines.pack import settings_after

    transformer = load_transformer(output / "model", getattr(torch, dtype))
    settings = settings_after(settings, output / "model")
    if transformer.config.attention == "block_causal":  # decoded block after block, as it was trained
        blocks = DecodeOptions(block_length=transformer.config.block_length)
        settings = replace(settings, samplers={task: blocks.apply(s) for task, s in settings.samplers.items()})
    UniDiffPipeline(transformer, *tokenizers, settings).save_pretrained(output / "pipeline")
