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
from torch import Tensor, nn

from unidiff.models.transformer import MaskedTransformer
from unidiff.pipeline import UniDiffPipeline
from unidiff.tokens import Vocabulary
from unidiff.tokens.image.vq import VQImageTokenizer
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
