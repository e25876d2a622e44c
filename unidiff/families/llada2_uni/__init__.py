"""LLaDA2.0-Uni (arXiv 2604.20796): LLaDA2.0's network with image codes behind its words, which reads pictures and draws them.

    drawing     <role>SYSTEM</role> ... <role>HUMAN</role> words <role>ASSISTANT</role> picture
    editing     <role>SYSTEM</role> ... <role>HUMAN</role> picture words <role>ASSISTANT</role> picture
    answer      picture question answer
    picture     <|image|> rows columns <boi> codes <|/image|>       rows and columns as <|reserved_token_32|>

Conventions of the family: those of LLaDA2. Words and codes share their [MASK] and their positions along the row; a picture is
drawn block after block of attention, line by line.
"""

from __future__ import annotations

from typing import Any

from unidiff.families.checkpoint.config_keys import ConfigError
from unidiff.families.family import Config, Family, Release, Tiny
from unidiff.families.llada2 import CONFIG, LLADA2, llada2_keymap, llada2_settings, llada2_vocabulary
from unidiff.families.llada2_uni.rows import LLaDA2UniLayout, uni_layout
from unidiff.families.llada_moe import RELEASED_ROWS, llada_moe_spelling
from unidiff.tokens import Vocabulary

IDS = {"soi": 156901, "eoi": 156902, "boi": 156904}
"""Of the released tokenizer, in no config."""
CODES = 16384


def uni_vocabulary(config: Config) -> Vocabulary:
    """Words with [MASK] among them, then image codes; `ConfigError` for a config without any."""
    ids = {**config}
    if config.get("image_token_offset") is None and config.get("vocab_size") == RELEASED_ROWS + CODES:
        ids["image_token_offset"] = RELEASED_ROWS
    if ids.get("image_token_offset") is None:
        raise ConfigError("config has no image_token_offset, the id of the first image code; add it")
    released = ids["image_token_offset"] == RELEASED_ROWS
    known = {"mask": 156895, "eos": 156892, "pad": 156892} if released else {}
    ids |= {f"{name}_token_id": i for name, i in known.items() if config.get(f"{name}_token_id") is None}
    found = llada2_vocabulary(ids)
    specials = {**found.specials, **(IDS if released else {})}
    return Vocabulary(found.size, found.text, found.image, found.mask_id, specials=specials)


def _fits(config: Config) -> bool:
    """Of LLaDA2's configs those with ids behind the words."""
    first = config.get("image_token_offset")
    size = config.get("vocab_size")
    coded = first is not None and isinstance(size, int) and first < size
    return LLADA2.fits(config) and (coded or size == RELEASED_ROWS + CODES)


RELEASED: dict[str, Any] = {
    **CONFIG,
    **dict(model_type="llada2_moe_veomni", vocab_size=RELEASED_ROWS + CODES, image_token_offset=RELEASED_ROWS),
    **dict(max_position_embeddings=8192),
}
_TINY: dict[str, Any] = {**LLADA2.tiny.config, "vocab_size": 56, "image_token_offset": 40}
LLADA2_UNI = Family(
    name="llada2-uni",
    keys=LLADA2.keys,
    fits=_fits,
    priority=1,  # these configs are LLaDA2's as well
    settings=llada2_settings,
    keymap=llada2_keymap,
    vocabulary=uni_vocabulary,
    vocabularies={"llada2-uni": uni_vocabulary(RELEASED)},
    image_tokenizer="siglip_vq",
    releases=(Release("llada2.0-uni", RELEASED, 16_000_000_000, 0.03),),
    tiny=Tiny(_TINY, (0.00454058, 0.369592, -0.414197, 0.566202)),
    spelling=llada_moe_spelling,
    layout=uni_layout,
)
__all__ = ["LLADA2_UNI", "LLaDA2UniLayout", "uni_layout", "uni_vocabulary"]
