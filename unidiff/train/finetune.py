"""What starts from a finished model: a run that trains it on, and a pipeline with another image tokenizer or more text tokens.

Every row of a new vocabulary's embedding and head is a weighted mean of old rows, so that training goes on from what the
model knows: a new image code is the mean of the old codes of the same cells, a new word that of its old pieces.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from torch import Tensor, nn

from unidiff.errors import read_json
from unidiff.models.transformer import MaskedTransformer
from unidiff.pipeline import UniDiffPipeline
from unidiff.pipelines.card import ModelFacts, read_origin
from unidiff.pipelines.folder import load_tokenizers, load_transformer
from unidiff.pipelines.options import DecodeOptions
from unidiff.pipelines.owned import check_target, read_settings
from unidiff.pipelines.pack import settings_after
from unidiff.schema import check_value
from unidiff.tokens import Vocabulary
from unidiff.tokens.image.vq import VQImageTokenizer
from unidiff.tokens.text import TextTokenizer
from unidiff.train.build import check_ids
from unidiff.train.config import TokenizerConfig, TrainConfig, leaves
from unidiff.train.data.source import TokenSource
from unidiff.train.trainer import train

LOOSE = ("attention", "block_length", "dropout")  # what may differ from the base: it changes no weight's shape


def finetune(folder: Path, config: TrainConfig, environment: Mapping[str, str]) -> int:
    """Train the model in `folder` on, as `unidiff.train.trainer.train` does; a pipeline is saved as one again.

    Its architecture, weights and tokenizers are taken over; `config.model` may change `LOOSE` settings. All that can be
    wrong with a pipeline is said before hours of training.

    Raises:
        FileNotFoundError: no transformer in the folder.
        ValueError: a damaged config, a model of another class, or a `config` that contradicts it.
    """
    pipeline, output = (folder / "model_index.json").is_file(), Path(config.output)
    weights = folder / "transformer" if pipeline else folder
    if not (weights / "config.json").is_file():
        raise FileNotFoundError(f"{str(folder)!r} holds neither a pipeline nor a transformer; name a folder with one")
    own = read_json(weights / "config.json", "the config of a transformer")
    if (kind := own.get("_class_name")) != "MaskedTransformer":
        raise ValueError(f"{weights} holds a {kind!r}; only MaskedTransformer models can be fine-tuned here")
    size = own.get("vocab_size")
    check_value(size, int, f"{weights / 'config.json'}: vocab_size")
    config = _taken_over(config, folder, weights, own)
    if pipeline:
        settings = read_settings(folder)
        check_target(output / "pipeline")
        tokenizers, origin = load_tokenizers(folder), read_origin(folder).trained_on()

    def check(source: TokenSource) -> None:
        if source.vocabulary.size != size:
            raise ValueError(
                f"the data has {source.vocabulary.size} ids, the model {size}; encode it with the model's tokenizers"
            )
        if pipeline:
            check_ids(settings.vocabulary, source, f"{str(folder)!r} has")

    def save_pipeline() -> None:
        """The weights of OUTPUT/model with the tokenizers and settings of the base."""
        transformer = load_transformer(output / "model", getattr(torch, config.checkpoint.export_dtype))
        after = settings_after(settings, output / "model")
        if transformer.config.attention == "block_causal":  # decoded block after block, as it was trained
            blocks = DecodeOptions(block_length=transformer.config.block_length)
            after = replace(after, samplers={task: blocks.apply(s) for task, s in after.samplers.items()})
        pipe = UniDiffPipeline(transformer, *tokenizers, after)
        pipe.save_pretrained(output / "pipeline", facts=origin.completed(ModelFacts(training=told(config))))

    return train(config, environment, check, save_pipeline if pipeline else None)


def told(config: TrainConfig) -> dict[str, Any]:
    """What a model card says of a run: settings that are not the usual ones, without names of files and folders."""
    usual = {name: value for name, value, _ in leaves(TrainConfig())}
    silent = ("output", "data.", "tokenizer.", "model", "logging.", "checkpoint.", "device", "threads")
    return {name: value for name, value, _ in leaves(config) if value != usual[name] and not name.startswith(silent)}


def _taken_over(config: TrainConfig, folder: Path, weights: Path, own: Mapping[str, Any]) -> TrainConfig:
    """`config` with the architecture of a base, its weights and its tokenizers filled in; see `finetune`."""
    base = {key: value for key, value in own.items() if not key.startswith("_") and key != "vocab_size"}
    for key, value in config.model.items():
        if key not in LOOSE and base.get(key, value) != value:
            raise ValueError(f"model.{key} = {value!r}, but {str(folder)!r} has {base[key]!r}; leave it out")
    start, tokenizer = config.checkpoint.init_from, config.tokenizer
    if start not in ("", str(weights)):
        raise ValueError(f"checkpoint.init_from = {start!r}; the model to start from is named first")
    if weights != folder:
        image = tokenizer.image or str(folder / "image_tokenizer")
        tokenizer = TokenizerConfig(image, tokenizer.text or str(folder / "text_tokenizer"))
    model = {key: value for key, value in {**base, **config.model}.items() if value is not None}
    checkpoint = replace(config.checkpoint, init_from=str(weights))
    return replace(config, model=model, tokenizer=tokenizer, checkpoint=checkpoint)


def with_image_tokenizer(
    pipe: UniDiffPipeline, tokenizer: VQImageTokenizer, images: Iterable[Tensor]
) -> UniDiffPipeline:
    """The pipeline with another image tokenizer of the same grid, ready to be trained on its codes.

    Args:
        pipe: stays as it is.
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
    codes = code + start, old + start, overlap[code, old]
    settings = replace(pipe.settings, vocabulary=replace(vocabulary, size=size, image=(start, size)))
    transformer = _mixed(pipe.transformer, size, _same(0, 0, start), codes)
    changed = UniDiffPipeline(transformer, tokenizer, pipe.texts, settings)
    changed.origin = pipe.origin.trained_on()
    return changed


def code_overlap(old: VQImageTokenizer, new: VQImageTokenizer, images: Iterable[Tensor]) -> Tensor:
    """How often cells of a new code have each old code: float `[new codes, old codes]`, rows sum to one.
    Raises ValueError where there are no images."""
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
        share = torch.full((len(pieces),), 1 / len(pieces))
        entries.append((torch.full_like(pieces, *more.encode(token)), pieces, share))
    settings = replace(pipe.settings, vocabulary=new)
    changed = UniDiffPipeline(_mixed(pipe.transformer, new.size, *entries), pipe.images, more, settings)
    changed.origin = pipe.origin
    return changed


Entries = tuple[Tensor, Tensor, Tensor]
"""New ids, old ids and weights, `[N]` each."""


def _same(new: int, old: int, count: int) -> Entries:
    """`count` rows from `new` on that are the old rows from `old` on."""
    numbers = torch.arange(count)
    return numbers + new, numbers + old, torch.ones(count)


@torch.no_grad()
def _mixed(transformer: MaskedTransformer, size: int, *entries: Entries) -> MaskedTransformer:
    """A copy with `size` ids, whose rows of embedding and head are sums of old rows, as the entries say."""
    new, old, shares = (torch.cat(part) for part in zip(*entries, strict=True))
    shape = (size, transformer.config.vocab_size)
    mix = torch.sparse_coo_tensor(torch.stack([new, old]), shares, shape, check_invariants=True).coalesce()
    weights = transformer.state_dict()
    for name in ("embed_tokens.weight", "output_weight", "output_bias"):
        if name in weights:
            kept = weights[name]
            rows = torch.sparse.mm(mix.to(kept.device), kept.float().reshape(len(kept), -1))  # [size, D or 1]
            weights[name] = rows.reshape(-1, *kept.shape[1:]).to(kept.dtype)
    config = {k: v for k, v in transformer.config.items() if not k.startswith("_")}
    model = MaskedTransformer(**{**config, "vocab_size": size})
    nn.Module.to(model, transformer.device, transformer.dtype)  # without diffusers' advice on loading
    model.load_state_dict(weights)
    return model
