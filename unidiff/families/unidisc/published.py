"""The published models of UniDisc."""

from __future__ import annotations

from unidiff.families.family import Release

_MODEL = {
    "norm_type": "rms",
    "qk_norm": True,
    "modality_embed": True,
    "sandwich_normalization": True,
    "full_attention": True,
    "text_vocab_size": 32001,
}


def _release(
    name: str, size: int, blocks: int, heads: int, codes: int, rope_2d: bool, millions: int, layout: str = "256"
) -> Release:
    """`layout`: the static one of 256 or 512 pixels, or "interleaved", which has the rotary tables of all sizes."""
    shape = {"hidden_size": size, "n_blocks": blocks, "n_heads": heads, "rope_2d": rope_2d, "image_vocab_size": codes}
    factor = {} if layout == "256" else {"linear_factor": 2}
    config = {"model": {**_MODEL, **shape, **factor}, "data": {"require_sample_ids": layout == "interleaved"}}
    return Release(name, config, millions * 10**6, 1 / millions)


RELEASES = (
    _release("unidisc-1.4b", 2048, 24, 16, 16384, True, 1407),
    _release("unidisc-1.4b-512", 2048, 24, 16, 16384, True, 1407, "512"),
    _release("unidisc-1.4b-interleaved", 2048, 24, 16, 16384, True, 1407, "interleaved"),
    _release("unidisc-medium", 1024, 24, 16, 8192, False, 384),
    _release("unidisc-medium-vq16", 1024, 24, 16, 16384, False, 401),
    _release("unidisc-small", 768, 12, 12, 8192, False, 147),
    _release("unidisc-small-vq16", 768, 12, 12, 16384, False, 159),
)
