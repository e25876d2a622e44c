"""LLaDA-V (You et al. 2025, arXiv 2505.16933): LLaDA that sees pictures, by a SigLIP2 tower and a projector.

Conventions of the family: those of LLaDA, under Llama's names; pictures are vectors in the prompt (`TokenBatch.features`), in
tiles of any resolution; the tower has no norm behind its last layer, and one layer less than the original.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from unidiff.families.checkpoint.config_keys import Argument, ConfigError, ConfigKeys
from unidiff.families.checkpoint.keymap import KeyMap
from unidiff.families.checkpoint.llama import LLAMA_KEYS, LLAMA_NAMES, llama_keymap, llama_settings
from unidiff.families.family import (
    Config,
    Family,
    Release,
    Spelling,
    Tiny,
    config_names,
    copied_head,
    special_ids,
    text_vocabulary,
)
from unidiff.families.llada import ROWS_8B
from unidiff.families.llada.rows import LLADA_CHAT
from unidiff.families.llada_v.network import VisionLanguageTransformer
from unidiff.families.llada_v.rows import LladaVLayout
from unidiff.schema import Depth, Epsilon, Index, Rows, Width
from unidiff.tokens import Vocabulary

SELECTED = -2
"""Upstream's choice of the tower's layers: the one before the last, so that the last is not even there."""
SPECIALS = ("mask", "bos", "eos", "pad", "eot", "start_header", "end_header")
KNOWN = {"mask": 126336, "eos": 126081, **LLADA_CHAT.marks}
"""Ids of the released size, which its config does not state."""
KEYS = ConfigKeys(
    "llada-v",
    used={
        **LLAMA_KEYS,
        "intermediate_size": Argument("ffn_size", Width),
        "rms_norm_eps": Argument("norm_eps", Epsilon, 1e-5),
        "vision_config": Mapping[str, Any] | None,
        **dict.fromkeys(("mm_vision_tower", "image_aspect_ratio"), str | None),
        "image_grid_pinpoints": Any,
        "mm_vision_select_layer": int | None,
        "mm_hidden_size": Width | None,
        **{f"{name}_token_id": Index | None for name in SPECIALS},
    },
    fixed={  # first the value that is built
        "hidden_act": ("silu",),
        "mm_projector_type": ("mlp2x_gelu",),
        "mm_patch_merge_type": ("spatial_unpad",),
        "mm_vision_select_feature": ("patch", None),
        **dict.fromkeys(("attention_bias", "mlp_bias", "mm_use_im_start_end", "mm_use_im_patch_token"), (False, None)),
    },
    harmless=("attention_dropout", "initializer_range", "use_cache", "mm_resampler_type"),
)
VISION = ConfigKeys(
    "llada-v vision_config",
    used={
        "hidden_size": Argument("vision_size", Width, 1152),
        "intermediate_size": Argument("vision_ffn_size", Width, 4304),
        "num_attention_heads": Argument("vision_heads", Depth, 16),
        "image_size": Argument("tile_side", Rows, 384),
        "patch_size": Argument("patch_side", Rows, 14),
        "num_hidden_layers": Depth,
    },
    fixed={
        "hidden_act": ("gelu_pytorch_tanh",),
        "layer_norm_eps": (1e-6,),
        "num_channels": (3,),
    },
    harmless=("attention_dropout", "vision_use_head"),
)
"""Of the tower as it was published, with all its layers; left out, that of the released model."""
LAYERS = 27


def llada_v_vocabulary(config: Config) -> Vocabulary:
    """Text ids only, with [MASK] inside the range."""
    KEYS.check(config)
    size = config["vocab_size"]
    known = KNOWN if size == ROWS_8B else {}
    return text_vocabulary(size, known | special_ids(config, *SPECIALS), f"{KNOWN['mask']} in the released model")


def llada_v_settings(config: Config) -> dict[str, Any]:
    """`VisionLanguageTransformer` arguments for an upstream configuration; `ConfigError` for an option that is not built."""
    taken, vision = KEYS.read(config), config.get("vision_config") or {}
    seen = VISION.read(vision)
    if "siglip" not in (tower := config.get("mm_vision_tower") or "siglip").lower():
        raise ConfigError(f"config has mm_vision_tower = {tower!r}; only SigLIP towers are supported")
    if config.get("mm_hidden_size") not in (None, seen["vision_size"]):
        raise ConfigError(
            f"config has mm_hidden_size = {config['mm_hidden_size']} and a tower of width {seen['vision_size']}; expected the same"
        )
    layers = vision.get("num_hidden_layers", LAYERS) + 1 + (config.get("mm_vision_select_layer") or SELECTED)
    ratio, grids = config.get("image_aspect_ratio") or "anyres", config.get("image_grid_pinpoints") or "(1x1),...,(1x1)"
    most = re.fullmatch(r"anyres(?:_max_(\d{1,3}))?", ratio)
    largest = re.fullmatch(r"\(1x1\),\.\.\.,\((\d{1,3})x\1\)", grids if isinstance(grids, str) else "")
    if most is None or largest is None or layers < 1:
        raise ConfigError(
            f"config has image_aspect_ratio = {ratio!r}, image_grid_pinpoints = {grids!r:.60} and {layers} layers of the tower; "
            "expected anyres_max_N, (1x1),...,(NxN) and one layer at least"
        )
    return {
        **taken,
        **seen,
        "vision_layers": layers,
        "most_tiles": None if most[1] is None else int(most[1]),
        "largest_grid": int(largest[1]),
        "num_kv_heads": config.get("num_key_value_heads") or taken["num_heads"],
        **llama_settings(config, 5e5),
    }


_VISION = "model.vision_tower.vision_tower.vision_model."
_SEEN = "encoder.layers.{i}."
_PARTS = ("layer_norm1", "layer_norm2", *(f"self_attn.{k}_proj" for k in ("q", "k", "v", "out")), "mlp.fc1", "mlp.fc2")
NAMES = {
    **LLAMA_NAMES,
    "vision.embeddings.patch_embedding": _VISION + "embeddings.patch_embedding",
    "vision.embeddings.position_embedding": _VISION + "embeddings.position_embedding",
    **{f"vision.{_SEEN}{part}": f"{_VISION}{_SEEN}{part}" for part in _PARTS},
    "vision.post_layernorm": _VISION + "post_layernorm",
    "projector.{i}": "model.mm_projector.{i}",
    "newline": "model.image_newline",
}


def llada_v_keymap(model: VisionLanguageTransformer, spelling: Spelling) -> KeyMap:
    """Names of a network with `llada_v_settings`."""
    return llama_keymap(model, NAMES)


CONFIG: dict[str, Any] = {
    **dict(
        model_type="llava_llada", hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, vocab_size=ROWS_8B
    ),
    **dict(num_key_value_heads=32, intermediate_size=12288, rms_norm_eps=1e-5, rope_theta=500000.0),
    **dict(max_position_embeddings=16384, tie_word_embeddings=False, mm_projector_type="mlp2x_gelu"),
    **dict(mm_vision_tower="siglip2-so400m-patch14-384", mm_hidden_size=1152, mm_vision_select_layer=-2),
    **dict(mm_patch_merge_type="spatial_unpad", image_aspect_ratio="anyres_max_4"),
    **dict(image_grid_pinpoints="(1x1),...,(6x6)"),
}
_TINY: dict[str, Any] = {
    **dict(model_type="llava_llada", hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24),
    **dict(
        vocab_size=40,
        mask_token_id=30,
        eos_token_id=29,
        mm_projector_type="mlp2x_gelu",
        image_aspect_ratio="anyres_max_2",
    ),
    **dict(mm_patch_merge_type="spatial_unpad", image_grid_pinpoints="(1x1),...,(2x2)", mm_hidden_size=8),
    "vision_config": dict(
        hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2, image_size=7, patch_size=2
    ),
}
LLADA_V = Family(
    name="llada-v",
    keys=(r"^model\.layers\.0\.self_attn\.q_proj\.weight$", r"^model\.vision_tower\.", r"^model\.image_newline$"),
    fits=lambda config: (
        config_names(config, "LlavaLLaDAModelLM", model_type="llava_llada")
        or {"mm_projector_type", "hidden_size", "num_hidden_layers"} <= config.keys()
    ),
    settings=llada_v_settings,
    keymap=llada_v_keymap,
    network=VisionLanguageTransformer,
    vocabulary=llada_v_vocabulary,
    vocabularies={"llada-v": llada_v_vocabulary(CONFIG)},
    releases=(Release("llada-v", CONFIG, 8_450_000_000, 3e-3),),  # 16.9 GB in bfloat16
    tiny=Tiny(_TINY, (0.0263758, 0.639158, -0.341738, 0.438149)),
    spelling=lambda names, config: copied_head(names, bool(config.get("tie_word_embeddings")), "lm_head.weight"),
    layout=LladaVLayout.of,
)
