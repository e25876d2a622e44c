"""A run that starts from a finished model: its architecture, its weights, its tokenizers; and the pipeline that it gives."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from torch import Tensor, nn

from unidiff.errors import read_json
from unidiff.models.transformer import MaskedTransformer
from unidiff.pipeline import UniDiffPipeline
from unidiff.pipelines.folder import check_target, load_tokenizers, load_transformer, read_settings
from unidiff.pipelines.options import DecodeOptions
from unidiff.pipelines.pack import settings_after
from unidiff.pipelines.settings import PipelineSettings
from unidiff.schema import check_value
from unidiff.tokens import Vocabulary
from unidiff.tokens.image.vq import VQImageTokenizer
from unidiff.tokens.text import TextTokenizer
from unidiff.train.build import check_ids
from unidiff.train.config import TokenizerConfig, TrainConfig
from unidiff.train.data.source import TokenSource
from unidiff.train.trainer import train

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
    """Train the model in `folder` on, as `unidiff.train.trainer.train` does, and save it as a pipeline again.

    All that can be wrong with the pipeline is said before hours of training.
    """

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
    settings = read_settings(folder)
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

    transformer = load_transformer(output / "model", getattr(torch, dtype))
    settings = settings_after(settings, output / "model")
    if transformer.config.attention == "block_causal":  # decoded block after block, as it was trained
        blocks = DecodeOptions(block_length=transformer.config.block_length)
        settings = replace(settings, samplers={task: blocks.apply(s) for task, s in settings.samplers.items()})
    UniDiffPipeline(transformer, *tokenizers, settings).save_pretrained(output / "pipeline")


def with_image_tokenizer(
    pipe: UniDiffPipeline, tokenizer: VQImageTokenizer, images: Iterable[Tensor]
) -> UniDiffPipeline:
    """The pipeline with another image tokenizer of the same grid, ready to be trained on its codes.

    Args:
        pipe: stays as it is.
        tokenizer: the other tokenizer.
        images: batches float `[B, 3, H, W]` in [0, 1] of the pipeline's size, some thousands of the kind that the model
            draws. Both tokenizers encode them; a code that none of them has becomes the mean over all codes in use.

    Raises:
        ValueError: another number of pixels per code, no images, or ids after those of the image codes.
    """
    vocabulary = pipe.settings.vocabulary
    if tokenizer.factor != pipe.images.factor:
        raise ValueError(
            f"the new image tokenizer has {tokenizer.factor} pixels per code, the old one {pipe.images.factor}; "
            "codes can only be matched where both have the same grid"
        )
    start, stop = vocabulary.image
    if stop != vocabulary.size:
        raise ValueError(f"image codes have the ids {start} to {stop - 1} of {vocabulary.size}; expected the last ones")
    overlap = code_overlap(pipe.images, tokenizer, images)
    size = start + tokenizer.codebook_size
    code, old = overlap.nonzero(as_tuple=True)
    mix = _mix((size, vocabulary.size), _same(0, 0, start), (code + start, old + start, overlap[code, old]))
    new = replace(vocabulary, size=size, image=(start, size))
    settings = replace(pipe.settings, vocabulary=new)
    return UniDiffPipeline(mix_rows(pipe.transformer, mix), tokenizer, pipe.texts, settings)


def code_overlap(old: VQImageTokenizer, new: VQImageTokenizer, images: Iterable[Tensor]) -> Tensor:
    """How often cells of a new code have each old code: float `[new codes, old codes]`, rows sum to one.

    Raises:
        ValueError: no images.
    """
    counts = torch.zeros(new.codebook_size * old.codebook_size)
    for batch in images:
        pair = new.encode(batch) * old.codebook_size + old.encode(batch)
        counts += torch.bincount(pair.flatten().cpu(), minlength=len(counts))
    counts = counts.view(new.codebook_size, old.codebook_size)
    if not counts.any():
        raise ValueError("no images were given; some thousands are needed to match the codes of the two tokenizers")
    seen = counts.sum(1, keepdim=True)
    return torch.where(seen > 0, counts, counts.sum(0)) / torch.where(seen > 0, seen, counts.sum())


def with_text_tokens(pipe: UniDiffPipeline, tokens: Sequence[str]) -> UniDiffPipeline:
    """The pipeline with more text tokens, each starting as the mean of the pieces that spelled it.

    Args:
        pipe: stays as it is.
        tokens: strings that become one token each wherever they occur, for instance `" axolotl"` with its space.

    Raises:
        ValueError: no tokens, an empty, repeated or known one, or a vocabulary not laid out as `Vocabulary.unified`.
    """
    vocabulary, texts = pipe.settings.vocabulary, pipe.texts
    specials, images = dict(vocabulary.specials), vocabulary.image_size
    if not tokens or len(set(tokens)) != len(tokens) or not all(tokens):
        raise ValueError(f"tokens {list(tokens)} must be at least one string, none empty and none twice")
    if known := [token for token in tokens if len(texts.encode(token)) == 1]:
        raise ValueError(f"{known[0]!r} is one token already; leave it out")
    if vocabulary != Vocabulary.unified(texts.size, images, specials):
        raise ValueError(
            "tokens can be added where ids are text, then [MASK], then image codes, as in unidiff's models"
        )
    tokenizer = deepcopy(texts.tokenizer)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in tokens])
    more = TextTokenizer(tokenizer)
    new = Vocabulary.unified(more.size, images, specials)
    entries = [_same(0, 0, texts.size), _same(new.mask_id, vocabulary.mask_id, 1 + images)]
    for token in tokens:
        pieces = torch.tensor(texts.encode(token))
        entries.append(
            (torch.full_like(pieces, *more.encode(token)), pieces, torch.full((len(pieces),), 1 / len(pieces)))
        )
    mix = _mix((new.size, vocabulary.size), *entries)
    settings = replace(pipe.settings, vocabulary=new)
    return UniDiffPipeline(mix_rows(pipe.transformer, mix), pipe.images, more, settings)


Entries = tuple[Tensor, Tensor, Tensor]
"""New ids, old ids and weights, `[N]` each."""


def _same(new: int, old: int, count: int) -> Entries:
    """`count` rows from `new` on that are the old rows from `old` on."""
    numbers = torch.arange(count)
    return numbers + new, numbers + old, torch.ones(count)


def _mix(size: tuple[int, int], *entries: Entries) -> Tensor:
    """A sparse matrix of this size, (new ids, old ids); entries of the same place add up."""
    new, old, weights = (torch.cat(part) for part in zip(*entries, strict=True))
    return torch.sparse_coo_tensor(torch.stack([new, old]), weights, size, check_invariants=True).coalesce()


@torch.no_grad()
def mix_rows(transformer: MaskedTransformer, mix: Tensor) -> MaskedTransformer:
    """A copy for another vocabulary, whose row `i` of embedding and head is `mix[i]` times the old rows.

    Args:
        mix: sparse float32 `[new size, old size]`.
    """
    weights = transformer.state_dict()
    for name in ("embed_tokens.weight", "output_weight", "output_bias"):
        if name in weights:
            old = weights[name]
            rows = torch.sparse.mm(mix.to(old.device), old.float().reshape(len(old), -1))  # [new size, D or 1]
            weights[name] = rows.reshape(-1, *old.shape[1:]).to(old.dtype)
    config = {k: v for k, v in transformer.config.items() if not k.startswith("_")}
    new = MaskedTransformer(**{**config, "vocab_size": len(mix)})
    nn.Module.to(new, transformer.device, transformer.dtype)  # without diffusers' advice on loading
    new.load_state_dict(weights)
    return new
