"""UniDisc (Swerdlow et al. 2025, arXiv 2503.20853): checkpoints of its `DIT` network, both layouts.

Conventions of the family: text uses its index, image tokens their row and column; one shared [MASK]; the network takes
no time unless the config says so. In the *static* layout a row is one text and one image, and padding is ordinary text
that attention sees and no loss counts. In the *interleaved* one, rows are packed with samples of texts and images of
several sizes, padding is invisible, and an image adds a vector for its number in the sample.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from unidiff.families.checkpoint.config_keys import Argument, ConfigError, ConfigKeys, check_setting, section
from unidiff.families.checkpoint.keymap import KeyMap
from unidiff.families.family import Config, Family, Release, Tiny
from unidiff.families.mdlm import DIT_FIXED, DIT_KEY, DIT_NAMES, DIT_SETTINGS, DIT_SIZES, TINY_SHAPE, has_images
from unidiff.families.unidisc.rows import UniDiscLayout, unidisc_interleaved
from unidiff.schema import Between, Index, Positive, Rows
from unidiff.tokens import Vocabulary

TEXT_VOCAB_SIZE = 32001  # LLaMA-2's ids and [MASK]
NORM_TYPES = {"layernorm": ("layer", 1e-5), "rms": ("rms", 1e-6)}  # with their epsilons
SPECIALS = {"bos": 1, "eos": 2, "image": 811}  # of the LLaMA-2 tokenizer that the released models use
INTERLEAVED_SIDES = (16, 32, 48, 64)  # rows and columns of the images that upstream has rotary tables for
INTERLEAVED_IMAGES = 16  # images of a sample that have a vector of their own
MODEL_KEYS = ConfigKeys(
    "unidisc (model)",
    used={
        **DIT_SIZES,
        "modality_embed": Argument("modality_embedding", bool | None, False),
        "sandwich_normalization": Argument("sandwich_norm", bool | None, False),
        "norm_type": Literal["layernorm", "rms"],
        "linear_factor": Positive | None,
        **dict.fromkeys(("qk_norm", "rope_2d", "force_time_conditioning"), bool | None),
        **dict.fromkeys(("text_vocab_size", "image_vocab_size"), Rows | None),
        "length": Annotated[int, Between(-1, 2**26)] | None,
    },
    fixed={  # other networks under the same class
        **dict.fromkeys(("use_pretrained_img_emb", "img_cond", "cond_label", "tie_word_embeddings"), (False, None)),
        "full_attention": (True, None),
        "type": DIT_FIXED["type"],
    },
    harmless=(
        "scale_by_sigma",  # of another parameterisation
        "zero_linear_init",  # only before training
        *("codebook_embed_dim", "downscale_ratio"),  # of the image tokenizer
    ),
)
FULL_KEYS = ConfigKeys(
    "unidisc",
    used={
        "model": Mapping[str, Any],
        "data": Mapping[str, Any] | None,
        "time_conditioning": bool | None,
        "vocab_size": Rows | None,
        "text_vocab_size": Rows | None,
        "mask_index": Index | None,
    },
    needed=("model",),
    fixed={key: DIT_FIXED[key] for key in ("parameterization", "backbone", "diffusion")},
)


def unidisc_vocabulary(config: Config) -> Vocabulary:
    """Text ids, [MASK], then image codes; upstream's text vocabulary counts [MASK]."""
    full = _checked(config)
    model = full["model"]
    text_size = config.get("text_vocab_size") or model.get("text_vocab_size") or TEXT_VOCAB_SIZE
    if config.get("vocab_size") is None and model.get("image_vocab_size") is None:
        raise ConfigError("UniDisc config names neither vocab_size nor model.image_vocab_size; add one")
    size = config.get("vocab_size") or text_size + model["image_vocab_size"]
    mask_id = config.get("mask_index")
    mask_id = text_size - 1 if mask_id is None else mask_id
    if mask_id != text_size - 1:
        raise ConfigError(f"mask_index = {mask_id}; UniDisc keeps [MASK] last of its text ids, at {text_size - 1}")
    specials = {name: i for name, i in SPECIALS.items() if i < mask_id}
    return Vocabulary(size, (0, mask_id), (text_size, size), mask_id, specials=specials)


def unidisc_settings(config: Config) -> dict[str, Any]:
    """`MaskedTransformer` arguments for an upstream configuration; a missing key takes upstream's default."""
    if section(config.get("config", config), "model").get("full_attention") is False:
        raise ConfigError("UniDisc option full_attention = False is its autoregressive baseline, not a masked model")
    full = _checked(config)
    model = full["model"]
    taken = MODEL_KEYS.read(model)
    norm, epsilon = NORM_TYPES[model.get("norm_type", "layernorm")]
    packed, rope_2d = unidisc_interleaved(config), bool(model.get("rope_2d"))
    return {
        "attention_gate": not taken["sandwich_norm"],
        **taken,
        "vocab_size": unidisc_vocabulary(config).size,
        **DIT_SETTINGS,
        "ffn_size": 4 * taken["hidden_size"],
        "norm": norm,
        "norm_eps": epsilon,
        "qk_norm": "width" if model.get("qk_norm") else "none",
        "qk_norm_type": "layer_bias",
        "qk_norm_eps": 1e-5,
        "rope": "2d" if rope_2d else "1d",
        "rope_linear_factor": 1.0 if packed else float(model.get("linear_factor") or 1.0),
        "rope_grid": INTERLEAVED_SIDES[0] if packed and rope_2d else None,
        "image_embeddings": INTERLEAVED_IMAGES if packed else 0,
        "time_conditioning": bool(full.get("time_conditioning") or model.get("force_time_conditioning")),
        "time_tokens": "image",
    }


def _checked(config: Config) -> Config:
    """The experiment configuration, every key of it looked at."""
    full = config.get("config", config)
    if full is not config:
        for key in ("time_conditioning", "vocab_size", "text_vocab_size", "mask_index"):
            check_setting(key, config.get(key), FULL_KEYS.used[key])
    FULL_KEYS.check(full)
    MODEL_KEYS.check(full["model"])
    return full


NAMES = {
    **DIT_NAMES,
    "blocks.{i}.attention.qkv": "blocks.{i}.attention.attn_qkv",
    "blocks.{i}.attention.out": "blocks.{i}.attention.attn_out",
    "blocks.{i}.attention.q_norm": "blocks.{i}.attention.q_norm",
    "blocks.{i}.attention.k_norm": "blocks.{i}.attention.k_norm",
    "blocks.{i}.ffn_out_norm": "blocks.{i}.post_ff_norm",
    "blocks.{i}.attention_out_norm": "blocks.{i}.pre_residual_norm",
    "embed_modality.weight": "modality_embed.embedding",
    "embed_image.weight": "img_count_embedding",
}
_MODEL: dict[str, Any] = {
    **dict(norm_type="rms", qk_norm=True, modality_embed=True, sandwich_normalization=True, full_attention=True),
    "text_vocab_size": TEXT_VOCAB_SIZE,
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


_TINY: dict[str, Any] = {
    **TINY_SHAPE,
    **dict(norm_type="rms", qk_norm=True, modality_embed=True, text_vocab_size=17, image_vocab_size=12),
}
UNIDISC = Family(
    name="unidisc",
    keys=(DIT_KEY, r"^blocks\.0\.attention\.attn_qkv\.weight$"),
    fits=has_images,
    settings=unidisc_settings,
    keymap=lambda model, spelling: KeyMap.of(model, NAMES),
    vocabulary=unidisc_vocabulary,
    vocabularies={
        "unidisc-vq16": unidisc_vocabulary({"vocab_size": 48385, "model": {}}),
        "unidisc-magvit": unidisc_vocabulary({"vocab_size": 40193, "model": {}}),
    },
    image_tokenizer="llamagen",
    releases=RELEASES,
    unstated=("cond_dim", "dropout"),
    tiny=Tiny({"model": _TINY}, (0.845297, 1.50554, 0.790528, -1.35141)),
    layout=UniDiscLayout.of,
)
