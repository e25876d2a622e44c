"""MMaDA (Yang et al. 2025, arXiv 2505.15809): LLaDA's network with text and image codes in one vocabulary.

Code c is id offset + c with offset 126349 in the 8B checkpoints, the number of text ids: declared here, never found
from a tokenizer's length. Text and images share one [MASK]. Images are MAGVIT-v2 codes (`unidiff.families.image_tokenizers.magvit`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unidiff.families.llada.weights import llada_settings
from unidiff.tokens.vocabulary import Vocabulary

SPECIALS: Mapping[str, int] = {
    "bos": 126080,
    "eos": 126081,
    "soi": 126084,
    "eoi": 126085,
    "sov": 126086,
    "eov": 126087,
    "t2i": 126088,
    "mmu": 126089,
    "t2v": 126090,
    "v2v": 126091,
    "lvg": 126092,
    "ipad": 126093,
    "r2i": 126094,
    "start_header": 126346,
    "end_header": 126347,
    "eot": 126348,
}
# upstream's LLaDA fields of the 8B checkpoints
RELEASED: Mapping[str, Any] = {
    "d_model": 4096,
    "n_heads": 32,
    "n_kv_heads": 32,
    "n_layers": 32,
    "mlp_hidden_size": 12288,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "new_vocab_size": 134656,
}


def mmada_vocabulary(
    size: int = 134656,
    offset: int = 126349,
    codebook_size: int = 8192,
    mask_id: int = 126336,
    specials: Mapping[str, int] = SPECIALS,
) -> Vocabulary:
    """Text ids below `offset`, image codes from it on; rows past the last code are unused."""
    return Vocabulary(size, (0, offset), (offset, offset + codebook_size), mask_id, specials=specials)


def mmada_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """`MaskedTransformer` arguments for LLaDA's fields and `new_vocab_size`; those left out are the 8B checkpoints'."""
    fields = {**RELEASED, **config}
    return llada_settings({**fields, "embedding_size": fields["new_vocab_size"]})
