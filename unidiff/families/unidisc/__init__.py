"""UniDisc (Swerdlow et al. 2025, arXiv 2503.20853): checkpoints of its `DIT` network, both layouts.

Conventions of the family: text uses its index, image tokens their row and column; one shared [MASK]; the network takes
no time unless the config says so. In the *static* layout a row is one text and one image, and padding is ordinary text
that attention sees and no loss counts. In the *interleaved* one, rows are packed with samples of texts and images of
several sizes, padding is invisible, and an image adds a vector for its number in the sample.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from unidiff.families.checkpoint.config_keys import Argument, ConfigError, ConfigKeys, section
from unidiff.families.checkpoint.keymap import KeyMap
from unidiff.families.family import Config, Family, Release, Tiny
from unidiff.families.mdlm import DIT_KEY, DIT_NAMES, TINY_SHAPE, has_images
from unidiff.families.unidisc.rows import UniDiscLayout, unidisc_interleaved
from unidiff.schema import Between, Depth, Index, Positive, Rows, Width
from unidiff.tokens import Vocabulary

TEXT_VOCAB_SIZE = 32001  # LLaMA-2's ids and [MASK]
NORM_TYPES = {"layernorm": "layer", "rms": "rms"}
LAYER_NORM_EPS = 1e-5
RMS_NORM_EPS = 1e-6
SPECIALS = {"bos": 1, "eos": 2, "image": 811}  # of the LLaMA-2 tokenizer that the released models use
INTERLEAVED_SIDES = (16, 32, 48, 64)  # rows and columns of the images that upstream has rotary tables for
INTERLEAVED_IMAGES = 16  # images of a sample that have a vector of their own
_HUGE = 2**26
MODEL_KEYS = ConfigKeys(
    "unidisc (model)",
    used={
        "hidden_size": Argument("hidden_size", Width, 768),
        "n_blocks": Argument("num_layers", Depth, 12),
        "n_heads": Argument("num_heads", Depth, 12),
        "cond_dim": Argument("cond_dim", Width, 128),
        "dropout": Argument("dropout", Annotated[float, Between(0, 0.999)], 0.1),
        "norm_type": Literal["layernorm", "rms"],
        "linear_factor": Positive | None,
        **dict.fromkeys(("qk_norm", "sandwich_normalization", "rope_2d"), bool | None),
        **dict.fromkeys(("modality_embed", "force_time_conditioning"), bool | None),
        **dict.fromkeys(("text_vocab_size", "image_vocab_size"), Rows | None),
        "length": Annotated[int, Between(-1, _HUGE)] | None,
    },
    fixed={  # other networks under the same class
        **dict.fromkeys(("use_pretrained_img_emb", "img_cond", "cond_label", "tie_word_embeddings"), (False, None)),
        "full_attention": (True, None),
        "type": ("ddit", "dit", None),
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
    fixed={"parameterization": ("subs",), "backbone": ("dit",), "diffusion": ("absorbing_state",)},
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
    norm = NORM_TYPES[model.get("norm_type", "layernorm")]
    sandwich = bool(model.get("sandwich_normalization", False))
    packed = unidisc_interleaved(config)
    return {
        **taken,
        "vocab_size": unidisc_vocabulary(config).size,
        "ffn_size": 4 * taken["hidden_size"],
        "norm": norm,
        "norm_eps": RMS_NORM_EPS if norm == "rms" else LAYER_NORM_EPS,
        "qk_norm": "width" if model.get("qk_norm", False) else "none",
        "qk_norm_type": "layer_bias",
        "qk_norm_eps": LAYER_NORM_EPS,
        "activation": "gelu_tanh",
        "rope": "2d" if model.get("rope_2d", False) else "1d",
        "rope_linear_factor": 1.0 if packed else float(model.get("linear_factor") or 1.0),
        "rope_grid": INTERLEAVED_SIDES[0] if packed and model.get("rope_2d", False) else None,
        "modality_embedding": bool(model.get("modality_embed", False)),
        "image_embeddings": INTERLEAVED_IMAGES if packed else 0,
        "time_conditioning": bool(full.get("time_conditioning", False) or model.get("force_time_conditioning", False)),
        "time_tokens": "image",
        "attention_gate": not sandwich,
        "sandwich_norm": sandwich,
        "head_bias": True,
        "ffn_bias": True,
    }


def _checked(config: Config) -> Config:
    """The experiment configuration, every key of it looked at."""
    full = config.get("config", config)
    if full is not config:
        outer = ConfigKeys("unidisc", {k: v for k, v in FULL_KEYS.used.items() if k not in ("model", "data")})
        outer.check({key: value for key, value in config.items() if key in outer.used})
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
