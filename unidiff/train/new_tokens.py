"""A trained pipeline with other tokens: another image tokenizer, or text tokens added to its vocabulary.

Every row of the new vocabulary's embedding and head is a weighted mean of old rows, so that training goes on from what
the model knows: a new image code is the mean of the old codes of the same cells, a new word that of its old pieces.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import replace

import torch
from tokenizers import AddedToken
from torch import Tensor

from unidiff.models.transformer import MaskedTransformer
from unidiff.pipeline import UniDiffPipeline
from unidiff.tokens import Vocabulary
from unidiff.tokens.image_vq import VQImageTokenizer
from unidiff.tokens.text import TextTokenizer


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
    mix = torch.zeros(start + tokenizer.codebook_size, vocabulary.size)
    mix[:start, :start] = torch.eye(start)
    mix[start:, start:] = overlap
    new = replace(vocabulary, size=len(mix), image=(start, len(mix)))
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
    mix = torch.zeros(new.size, vocabulary.size)
    mix[: texts.size, : texts.size] = torch.eye(texts.size)
    for token in tokens:
        (number,), pieces = more.encode(token), texts.encode(token)
        mix[number] = torch.bincount(torch.tensor(pieces), minlength=vocabulary.size) / len(pieces)
    mix[new.mask_id :, vocabulary.mask_id :] = torch.eye(1 + images)
    settings = replace(pipe.settings, vocabulary=new)
    return UniDiffPipeline(mix_rows(pipe.transformer, mix), pipe.images, more, settings)


@torch.no_grad()
def mix_rows(transformer: MaskedTransformer, mix: Tensor) -> MaskedTransformer:
    """A copy for another vocabulary, whose row `i` of embedding and head is `mix[i]` `[old size]` times the old rows."""
    weights = transformer.state_dict()
    for name in ("embed_tokens.weight", "output_weight", "output_bias"):
        if name in weights:
            old = weights[name]
            weights[name] = (mix.to(old.device) @ old.float()).to(old.dtype)
    config = {k: v for k, v in transformer.config.items() if not k.startswith("_")}
    new = MaskedTransformer(**{**config, "vocab_size": len(mix)}).to(transformer.dtype).to(transformer.device)
    new.load_state_dict(weights)
    return new
