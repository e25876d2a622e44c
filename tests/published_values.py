"""Published values of the released models: the settings of ours that their configurations must become, id layouts, samplers.

Written down apart from the maps that make them: a tiny model cannot tell an epsilon or a rotary base from another.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from unidiff.families.family import named_vocabulary

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Published:
    """What is stated of one model: arguments of ours, fields of its `Vocabulary`, and its sampler under upstream's names."""

    settings: Settings
    vocabulary: Settings = field(default_factory=dict)
    sampling: Settings = field(default_factory=dict)


_UNIDISC_SETTINGS = {
    "norm": "rms",
    "norm_eps": 1e-6,
    "qk_norm": "width",
    "qk_norm_type": "layer_bias",
    "activation": "gelu_tanh",
    "sandwich_norm": True,
    "modality_embedding": True,
    "rope_theta": 1e4,
    "head_bias": True,
    "ffn_bias": True,
    "tie_head": False,
    "time_conditioning": False,
    "attention": "full",
}
_UNIDISC_SAMPLING = {"predictor": "maskgit", "steps": 50, "cfg": 3.0, "r_temp": 4.5}


def _unidisc(size: int, blocks: int, heads: int, codes: int, rope: str, factor: float = 1.0, grid: int | None = None):
    rows = 32001 + codes
    shape = {"vocab_size": rows, "hidden_size": size, "num_layers": blocks, "num_heads": heads}
    ids = {"size": rows, "text": (0, 32000), "image": (32001, rows), "mask_id": 32000}
    return Published(
        {**_UNIDISC_SETTINGS, **shape, "rope": rope, "rope_linear_factor": factor, "rope_grid": grid},
        {**ids, "specials": {"bos": 1, "eos": 2, "image": 811}},
        _UNIDISC_SAMPLING,
    )


_LLADA_SETTINGS = {
    "vocab_size": 126464,
    "hidden_size": 4096,
    "num_layers": 32,
    "num_heads": 32,
    "num_kv_heads": 32,
    "ffn_size": 12288,
    "norm": "rms",
    "norm_eps": 1e-5,
    "qk_norm": "none",
    "activation": "swiglu",
    "rope": "1d",
    "rope_theta": 5e5,
    "modality_embedding": False,
    "time_conditioning": False,
    "tie_head": False,
    "head_bias": False,
    "linear_bias": False,
    "attention": "full",
}
_LLADA_VOCABULARY = {"size": 126464, "mask_id": 126336, "specials": {"eos": 126081, "pad": 126081, "eot": 126348}}
_LLADA_SAMPLING = {
    "steps": 128,
    "gen_length": 128,
    "block_length": 128,
    "temperature": 0.0,
    "cfg_scale": 0.0,
    "remasking": "low_confidence",
}
_LLADA = Published(_LLADA_SETTINGS, _LLADA_VOCABULARY, _LLADA_SAMPLING)
_LLADA_V = Published(
    {
        **_LLADA_SETTINGS,
        **{"vision_size": 1152, "vision_layers": 26, "vision_heads": 16, "vision_ffn_size": 4304},
        **{"tile_side": 384, "patch_side": 14, "largest_grid": 6, "most_tiles": 4},
    },
    {
        **{"size": 126464, "mask_id": 126336},
        "specials": {"bos": 126080, "eos": 126081, "start_header": 126346, "end_header": 126347, "eot": 126348},
    },
    _LLADA_SAMPLING,
)
_DREAM_SETTINGS = {
    **_LLADA_SETTINGS,
    "vocab_size": 152064,
    "hidden_size": 3584,
    "num_layers": 28,
    "num_heads": 28,
    "num_kv_heads": 4,
    "ffn_size": 18944,
    "norm_eps": 1e-6,
    "rope_theta": 1e6,
    "qkv_bias": True,
    "shift": True,
}
_DREAM_VOCABULARY = {"size": 152064, "mask_id": 151666, "specials": {"eos": 151643, "pad": 151643}}
_LLADA_MOE_SETTINGS = {  # kv heads and ids follow from the stated sizes of the weights
    "vocab_size": 157184,
    "hidden_size": 2048,
    "num_layers": 16,
    "num_heads": 16,
    "num_kv_heads": 16,
    "num_experts": 64,
    "experts_per_token": 8,
    "expert_size": 1024,
    "shared_expert_size": 0,
    "dense_layers": (),
    "router": "softmax",
    "router_normalised": False,
    "qk_norm": "head",
    "rope": "1d",
    "rope_theta": 5e4,
    "attention": "full",
}
_LING_IDS = {"size": 157184, "mask_id": 156895, "specials": {"eos": 156892, "pad": 156892}}
_LLADA2_SETTINGS = {
    "vocab_size": 157184,
    "hidden_size": 2048,
    "num_layers": 20,
    "num_heads": 16,
    "num_kv_heads": 4,
    "head_size": 128,
    "ffn_size": 5120,
    "norm_eps": 1e-6,
    "num_experts": 256,
    "experts_per_token": 8,
    "expert_size": 512,
    "shared_expert_size": 512,
    "dense_layers": (0,),
    "router": "sigmoid",
    "router_bias": "selection",
    "router_groups": 8,
    "router_top_groups": 4,
    "router_normalised": True,
    "router_scale": 2.5,
    "qk_norm": "head",
    "rope": "1d",
    "rope_theta": 6e5,
    "rope_share": 0.5,
    "attention": "block_causal",
    "block_length": 32,
}
_LLADA2_SAMPLING = {
    "block_length": 32,
    "steps": 32,
    "threshold": 0.95,
    "edit_threshold": 0.9,
    "edit_passes": 16,
    "least": 1,
}
_LUMINA_ROWS = named_vocabulary("lumina").size
_MMADA_VOCABULARY = {
    "size": 134656,
    "text": (0, 126349),
    "image": (126349, 126349 + 8192),
    "mask_id": 126336,
    "specials": {
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
        "interleave": 126095,
        "t2it": 126096,
        "start_header": 126346,
        "end_header": 126347,
        "eot": 126348,
    },
}
_LUMINA_VOCABULARY = {
    "size": _LUMINA_ROWS,
    "image": (126356, 126356 + 8192),
    "mask_id": 126336,
    "specials": {
        "newline": 126084,
        "answer_pad": 126339,
        "boi": 126349,
        "eoi": 126350,
        "uncondition": 126351,
        "answer": 126354,
        "end_answer": 126355,
    },
}
_LUMINA_SAMPLING = {"timesteps": 64, "cfg_scale": 4.0, "cache_ratio": 0.9, "warmup_ratio": 0.3, "refresh_interval": 5}
_MUDDIT_SETTINGS = {
    "vocab_size": 8256,
    "codebook_size": 8192,
    "num_layers": 14,
    "num_single_layers": 28,
    "num_heads": 8,
    "head_dim": 128,
    "text_dim": 1024,
    "pooled_dim": 1024,
    "rope_axes": (16, 56, 56),
    "rope_theta": 1e4,
    "adapter_dim": None,
    "downsample": True,
}
_MUDDIT_VOCABULARY = {
    "size": 49409 + 8256,
    "text": (0, 49408),
    "image": (49409, 49409 + 8192),
    "mask_id": 49408,
    "image_mask_id": 49409 + 8255,
}
_MUDDIT_SAMPLING = {
    "guidance_scale": 9.0,
    "temperature": (2.0, 0.0),
    "aesthetic_score": 6.0,
    "crop": (0.0, 0.0),
}
MUDDIT_TENSORS = 868  # in the released file


def _llamagen(multipliers: tuple[int, ...]) -> Published:
    return Published(
        {
            "codebook_size": 16384,
            "code_dim": 8,
            "encoder_channels": 128,
            "decoder_channels": 128,
            "encoder_multipliers": multipliers,
            "decoder_multipliers": multipliers,
            "encoder_depths": (2,) * len(multipliers),
            "decoder_depths": (3,) * len(multipliers),
            "z_channels": 256,
            "l2_norm": True,
        }
    )


_MAGVIT_SETTINGS = {
    "code_dim": 13,
    "z_channels": 13,
    "encoder_channels": 128,
    "decoder_channels": 128,
    "encoder_multipliers": (1, 2, 2, 4, 4),
    "decoder_multipliers": (1, 1, 2, 2, 4),
    "encoder_depths": (4, 3, 4, 3, 4),
    "decoder_depths": (4, 4, 3, 4, 3),
}
_VQ_SETTINGS = {
    "block_out_channels": (128, 256, 256, 512, 768),
    "layers_per_block": 2,
    "latent_channels": 64,
    "num_vq_embeddings": 8192,
    "force_upcast": True,
}

_DYNIN_VOCABULARY = {
    **_MMADA_VOCABULARY,
    "size": 138752,
    "others": {"speech": (134541, 134541 + 4096)},
    "specials": {
        **{name: i for name, i in _MMADA_VOCABULARY["specials"].items() if name not in ("interleave", "t2it")},
        **{"i2i": 126095, "s2t": 126096, "soa": 126097, "eoa": 126098, "t2s": 126099, "v2t": 126100},
        **{"s2s": 126101, "v2s": 126102, "ti2ti": 126103, "t2ti": 126104, "think": 126105, "end_think": 126106},
    },
}
_DYNIN_SAMPLING = {
    "max_text_len": 128,
    "guidance_scale": 3.5,
    "timesteps": 20,
    "temperature": 1.0,
    "edit_timesteps": 64,
}
_UNI_IDS = {
    "size": 173568,
    "text": (0, 157184),
    "image": (157184, 173568),
    "mask_id": 156895,
    "specials": {"eos": 156892, "pad": 156892, "soi": 156901, "eoi": 156902, "boi": 156904},
}
_UNI_SAMPLING = {"block_length": 32, "steps": 16, "threshold": 0.95, "guidance": 4.0, "rescale": 0.7, "edit_steps": 8}
_DDIT_SETTINGS = {
    "vocab_size": 32100,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "num_heads": 24,
    "head_dim": 64,
    "text_dim": 4096,
}

PUBLISHED: dict[str, Published] = {
    "unidisc-1.4b": _unidisc(2048, 24, 16, 16384, "2d"),
    "unidisc-1.4b-512": _unidisc(2048, 24, 16, 16384, "2d", 2.0),
    "unidisc-1.4b-interleaved": _unidisc(2048, 24, 16, 16384, "2d", grid=16),
    "unidisc-medium": _unidisc(1024, 24, 16, 8192, "1d"),
    "unidisc-medium-vq16": _unidisc(1024, 24, 16, 16384, "1d"),
    "unidisc-small": _unidisc(768, 12, 12, 8192, "1d"),
    "unidisc-small-vq16": _unidisc(768, 12, 12, 16384, "1d"),
    "mdlm": Published(
        {"vocab_size": 50258, "rope": "1d", "rope_theta": 1e4, "constant_time": 0.0, "modality_embedding": False},
        {"size": 50258, "text": (0, 50257), "image": (50257, 50257), "mask_id": 50257},
    ),
    **dict.fromkeys(("llada-8b-base", "llada-8b-instruct", "llada-1.5"), _LLADA),
    "llada-v": _LLADA_V,
    "dream-7b": Published(_DREAM_SETTINGS, _DREAM_VOCABULARY),
    **dict.fromkeys(("llada-moe-7b-a1b-base", "llada-moe-7b-a1b-instruct"), Published(_LLADA_MOE_SETTINGS, _LING_IDS)),
    **dict.fromkeys(("llada2.0-mini", "llada2.1-mini"), Published(_LLADA2_SETTINGS, _LING_IDS, _LLADA2_SAMPLING)),
    "llada2.0-uni": Published({**_LLADA2_SETTINGS, "vocab_size": 173568}, _UNI_IDS, _UNI_SAMPLING),
    "mmada-8b": Published({**_LLADA_SETTINGS, "vocab_size": 134656}, _MMADA_VOCABULARY),
    "mmada-8b-mixcot": Published({**_LLADA_SETTINGS, "vocab_size": 134656}, _MMADA_VOCABULARY),
    "mmada-parallel-m": Published({**_LLADA_SETTINGS, "vocab_size": 134656}, _MMADA_VOCABULARY),
    "mmada-parallel-a": Published({**_LLADA_SETTINGS, "vocab_size": _LUMINA_ROWS}, _LUMINA_VOCABULARY),
    "dynin-omni": Published({**_LLADA_SETTINGS, "vocab_size": 138752}, _DYNIN_VOCABULARY, _DYNIN_SAMPLING),
    "lumina-dimoo": Published({**_LLADA_SETTINGS, "vocab_size": _LUMINA_ROWS}, _LUMINA_VOCABULARY, _LUMINA_SAMPLING),
    "muddit": Published({**_MUDDIT_SETTINGS, "text_vocab_size": 49408}, _MUDDIT_VOCABULARY, _MUDDIT_SAMPLING),
    "ddit": Published(_DDIT_SETTINGS, {"size": 32100, "text": (0, 32100), "image": (32100, 32100), "mask_id": 32099}),
    "meissonic": Published({**_MUDDIT_SETTINGS, "text_vocab_size": None}, _MUDDIT_VOCABULARY, _MUDDIT_SAMPLING),
    "llamagen-vq-16": _llamagen((1, 1, 2, 2, 4)),
    "llamagen-vq-8": _llamagen((1, 2, 2, 4)),
    "magvitv2": Published(_MAGVIT_SETTINGS),
    "muddit-vq": Published(_VQ_SETTINGS),
}
