"""Published values of the released models: what a checkpoint's configuration holds, and the setting of ours it becomes.

Data. A tiny model cannot tell an epsilon or a rotary base from another, so they are written down here. Values of a
release that no publication states are left out. `config` is under upstream's names, `settings` under ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from unidiff.families.dream.weights import RELEASED as DREAM
from unidiff.families.image_tokenizers.llamagen import RELEASED as LLAMAGEN
from unidiff.families.image_tokenizers.magvit import RELEASED as MAGVIT
from unidiff.families.mmada.weights import RELEASED as MMADA
from unidiff.families.muddit.weights import PUBLISHED as MUDDIT
from unidiff.tokens.vocabulary import Vocabulary

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Release:
    """One published model.

    Attributes:
        name: of the release. family: the module that reads it.
        config: upstream's configuration, as published.
        settings: arguments of our model that it must become (more may be set; these are the published ones).
        vocabulary: fields of our `Vocabulary` that it must become; its `specials` may hold more ids than these.
        parameters: number of parameters as stated, None where no number is. tolerance: relative, one unit of its last digit
            (some are cut off rather than rounded).
        tensors: number of tensors in the released file, None where it is not stated.
        sampling: upstream's default sampler settings, under upstream's names.
    """

    name: str
    family: str
    config: Settings
    settings: Settings
    vocabulary: Settings = field(default_factory=dict)
    parameters: int | None = None
    tolerance: float = 0.0
    tensors: int | None = None
    sampling: Settings = field(default_factory=dict)


# ------------------------------------------------------------------------------------------------------------ UniDisc
_UNIDISC = {
    "norm_type": "rms",
    "qk_norm": True,
    "modality_embed": True,
    "sandwich_normalization": True,
    "full_attention": True,
    "text_vocab_size": 32001,
}
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


def _unidisc(
    name: str,
    size: int,
    blocks: int,
    heads: int,
    codes: int,
    rope_2d: bool,
    parameters: int,
    layout: str = "256",
) -> Release:
    """`layout`: the static one of 256 or 512 pixels, or "interleaved", which has the rotary tables of all sizes."""
    shape = {"hidden_size": size, "n_blocks": blocks, "n_heads": heads}
    model = {**_UNIDISC, **shape, "rope_2d": rope_2d, "image_vocab_size": codes}
    packed, rows = layout == "interleaved", 32001 + codes
    if layout != "256":
        model["linear_factor"] = 2
    return Release(
        name,
        "unidisc",
        {"model": model, "data": {"require_sample_ids": packed}},
        {
            **_UNIDISC_SETTINGS,
            "vocab_size": rows,
            "hidden_size": size,
            "num_layers": blocks,
            "num_heads": heads,
            "rope": "2d" if rope_2d else "1d",
            "rope_linear_factor": 2.0 if layout == "512" else 1.0,
            "rope_grid": 16 if packed else None,
        },
        {
            "size": rows,
            "text": (0, 32000),
            "image": (32001, rows),
            "mask_id": 32000,
            "specials": {"bos": 1, "eos": 2, "image": 811},
        },
        parameters,
        1_000_000 / parameters,
        sampling=_UNIDISC_SAMPLING,
    )


# -------------------------------------------------------------------------------------------- LLaDA and its descendants
_LLADA = {
    "activation_type": "silu",
    "block_type": "llama",
    "d_model": 4096,
    "n_layers": 32,
    "n_heads": 32,
    "n_kv_heads": 32,
    "mlp_hidden_size": 12288,
    "vocab_size": 126464,
    "embedding_size": 126464,
    "mask_token_id": 126336,
    "eos_token_id": 126081,
    "pad_token_id": 126081,
    "rope": True,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "layer_norm_type": "rms",
    "max_sequence_length": 4096,
    "weight_tying": False,
    "include_bias": False,
    "include_qkv_bias": False,
}
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
_LUMINA_ROWS = Vocabulary.named("lumina").size


def _llada(name: str) -> Release:
    # "8B" is the number that the models' names state
    return Release(
        name, "llada", _LLADA, _LLADA_SETTINGS, _LLADA_VOCABULARY, 8_000_000_000, 5e-2, sampling=_LLADA_SAMPLING
    )


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
# ------------------------------------------------------------------------------------------------- Muddit and Meissonic
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
_VQ_SETTINGS = {  # of Muddit and Meissonic; of Lumina-DiMOO's VQModel only factor 16 and 8,192 codes are stated
    "block_out_channels": (128, 256, 256, 512, 768),
    "layers_per_block": 2,
    "latent_channels": 64,
    "num_vq_embeddings": 8192,
    "force_upcast": True,
}
_VQ = {
    "_class_name": "VQModel",
    **_VQ_SETTINGS,
    "down_block_types": ["DownEncoderBlock2D"] * 5,
    "up_block_types": ["UpDecoderBlock2D"] * 5,
}
# ----------------------------------------------------------------------------------------------------- image tokenizers


def _llamagen(name: str) -> Release:
    multipliers = {"VQ-16": (1, 1, 2, 2, 4), "VQ-8": (1, 2, 2, 4)}[name]
    settings = {
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
    return Release(f"llamagen-{name.lower()}", "llamagen", LLAMAGEN[name], settings)


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

RELEASES: tuple[Release, ...] = (
    _unidisc("unidisc-1.4b", 2048, 24, 16, 16384, True, 1_407_000_000),
    _unidisc("unidisc-1.4b-512", 2048, 24, 16, 16384, True, 1_407_000_000, "512"),
    _unidisc("unidisc-1.4b-interleaved", 2048, 24, 16, 16384, True, 1_407_000_000, "interleaved"),
    _unidisc("unidisc-medium", 1024, 24, 16, 8192, False, 384_000_000),
    _unidisc("unidisc-medium-vq16", 1024, 24, 16, 16384, False, 401_000_000),
    _unidisc("unidisc-small", 768, 12, 12, 8192, False, 147_000_000),
    _unidisc("unidisc-small-vq16", 768, 12, 12, 16384, False, 159_000_000),
    Release(
        "mdlm",
        "mdlm",
        {"vocab_size": 50258},
        {"vocab_size": 50258, "rope": "1d", "rope_theta": 1e4, "constant_time": 0.0, "modality_embedding": False},
        {"size": 50258, "text": (0, 50257), "image": (50257, 50257), "mask_id": 50257},
    ),
    _llada("llada-8b-base"),
    _llada("llada-8b-instruct"),
    _llada("llada-1.5"),
    Release("dream-7b", "dream", DREAM, _DREAM_SETTINGS, _DREAM_VOCABULARY, 7_000_000_000, 0.1),
    Release(
        "mmada-8b",
        "mmada",
        MMADA,
        {**_LLADA_SETTINGS, "vocab_size": 134656},
        _MMADA_VOCABULARY,
        8_000_000_000,
        5e-2,
    ),
    Release(
        "lumina-dimoo",
        "lumina",
        {**_LLADA, "vocab_size": _LUMINA_ROWS, "embedding_size": _LUMINA_ROWS},
        {**_LLADA_SETTINGS, "vocab_size": _LUMINA_ROWS},
        _LUMINA_VOCABULARY,
        8_000_000_000,
        5e-2,
        sampling={"timesteps": 64, "cfg_scale": 4.0, "cache_ratio": 0.9, "warmup_ratio": 0.3, "refresh_interval": 5},
    ),
    Release(
        "muddit",
        "muddit",
        {"_class_name": "SymmetricTransformer2DModel", **MUDDIT["muddit"]},
        {**_MUDDIT_SETTINGS, "text_vocab_size": 49408},
        _MUDDIT_VOCABULARY,
        1_057_540_096,
        0.0,
        868,
        _MUDDIT_SAMPLING,
    ),
    Release(
        "meissonic",
        "meissonic",
        {"_class_name": "Transformer2DModel", **MUDDIT["meissonic"]},
        {**_MUDDIT_SETTINGS, "text_vocab_size": None},
        _MUDDIT_VOCABULARY,
        sampling=_MUDDIT_SAMPLING,
    ),
    _llamagen("VQ-16"),
    _llamagen("VQ-8"),
    Release("magvitv2", "magvit", MAGVIT, _MAGVIT_SETTINGS),
    Release("muddit-vq", "vq_model", _VQ, _VQ_SETTINGS),
)
