"""Dynin-Omni (AIDAS Lab 2026, arXiv 2604.00007): MMaDA's network and rows, with edits, and codes of speech behind those of images.

    picture     <t2i> bos words eos soi codes eoi                             padded on the left
    edit        <i2i> soi source eoi padding bos words eos soi codes eoi      words and padding have one length
    both        <ti2ti> soi source eoi bos words eos soi codes eoi bos answer
    question    <mmu> soi codes eoi bos words answer

Ids are text, 8,192 image codes, 4,096 speech codes, and rows that nothing uses. Speech and video are read and drawn by no task
here: the ids of speech codes are named (`Vocabulary.others`), their weights load and convert as all others, and so do those of
a video merger, where a checkpoint holds one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unidiff.families.dynin.rows import DyninLayout
from unidiff.families.family import Family, Release, Tiny, config_names
from unidiff.families.llada import EIGHT_BILLION, LLADA_NAMES, TINY_CONFIG
from unidiff.families.mmada import RELEASED as MMADA_8B
from unidiff.families.mmada import SPECIALS as OF_MMADA
from unidiff.families.mmada import mmada_settings
from unidiff.tokens import Vocabulary

SPECIALS: Mapping[str, int] = {
    **{name: i for name, i in OF_MMADA.items() if name not in ("interleave", "t2it")},
    **dict(i2i=126095, s2t=126096, soa=126097, eoa=126098, t2s=126099, v2t=126100, s2s=126101, v2s=126102),
    **dict(ti2ti=126103, t2ti=126104, think=126105, end_think=126106),
}
RELEASED: Mapping[str, Any] = {
    **MMADA_8B,
    **dict(model_type="dynin_omni", new_vocab_size=138752, llm_vocab_size=126464, codebook_size=8192),
}


def dynin_vocabulary(
    size: int = 138752,
    offset: int = 126349,
    codebook_size: int = 8192,
    speech_size: int = 4096,
    mask_id: int = 126336,
    specials: Mapping[str, int] = SPECIALS,
) -> Vocabulary:
    """Text ids below `offset`, image codes from it on, speech codes behind them; rows past the last one are unused."""
    speech = offset + codebook_size
    image, others = (offset, speech), {"speech": (speech, speech + speech_size)}
    return Vocabulary(size, (0, offset), image, mask_id, specials=specials, others=others)


def has_speech(config: Mapping[str, Any]) -> bool:
    """Whether a config speaks of more ids than those of text and of image codes."""
    rows = [config.get(name) for name in ("new_vocab_size", "llm_vocab_size", "codebook_size")]
    sizes = [row for row in rows if isinstance(row, int)]
    return len(sizes) == len(rows) and sizes[0] > sizes[1] + sizes[2]


def dynin_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """`MaskedTransformer` arguments for LLaDA's fields and `new_vocab_size`; those left out are the released model's."""
    return mmada_settings(config, RELEASED)


DYNIN = Family(
    name="dynin",
    fits=lambda config: config_names(config, "DyninOmniModelLM", model_type="dynin_omni") or has_speech(config),
    priority=1,  # MMaDA's settings and more
    rows={"transformer.wte.weight": RELEASED["new_vocab_size"]},
    settings=dynin_settings,
    default_config=lambda names: RELEASED,
    vocabulary=lambda config: dynin_vocabulary(),
    vocabularies={"dynin": dynin_vocabulary()},
    image_tokenizer="magvit",
    carried=(r"^video_token_merger\.(norm|fc1|fc2)\.(weight|bias)$",),
    releases=(Release("dynin-omni", RELEASED, *EIGHT_BILLION),),
    tiny=Tiny(
        {**TINY_CONFIG, "model_type": "dynin_omni", "new_vocab_size": 48},
        (0.0315275, 0.731748, 0.736357, 0.731374),
        dynin_vocabulary(48, 24, 16, 4, 21, {"eos": 19}),
    ),
    **LLADA_NAMES,
    layout=DyninLayout.of,
)
