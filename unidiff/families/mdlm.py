"""MDLM (Sahoo et al. 2024, arXiv 2406.07524): text-only checkpoints of its `DIT` network, which UniDisc has too.

The network's time is sigma = -log alpha(t); a model trained without time conditioning always sees sigma = 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import torch

from unidiff.decoding.config import ModalityDecoding, SamplerConfig
from unidiff.families.chat import TextLayout
from unidiff.families.checkpoint.config_keys import Argument, ConfigKeys, section
from unidiff.families.checkpoint.keymap import KeyMap
from unidiff.families.family import Config, Family, Release, Spelling, Tiny, config_names, special_ids
from unidiff.models.transformer import MaskedTransformer
from unidiff.schema import Between, Depth, Index, Rows, Width
from unidiff.tokens import Vocabulary

TINY_SHAPE = {"hidden_size": 16, "n_blocks": 2, "n_heads": 2, "cond_dim": 8}
DIT_KEY = r"^(backbone\.)?vocab_embed\.embedding$"
DIT_NAMES = {
    "embed_tokens.weight": "vocab_embed.embedding",
    "embed_time.up": "sigma_map.mlp.0",
    "embed_time.down": "sigma_map.mlp.2",
    "blocks.{i}.attention_norm": "blocks.{i}.norm1",
    "blocks.{i}.attention.qkv": "blocks.{i}.attn_qkv",
    "blocks.{i}.attention.out": "blocks.{i}.attn_out",
    "blocks.{i}.ffn_norm": "blocks.{i}.norm2",
    "blocks.{i}.feed_forward.up": "blocks.{i}.mlp.0",
    "blocks.{i}.feed_forward.down": "blocks.{i}.mlp.2",
    "blocks.{i}.ada_ln.linear": "blocks.{i}.adaLN_modulation",
    "final_norm": "output_layer.norm_final",
    "output_weight": "output_layer.linear.weight",
    "output_bias": "output_layer.linear.bias",
    "final_ada_ln.linear": "output_layer.adaLN_modulation",
}


def dit_section(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The `model` section of an upstream experiment configuration, empty without one."""
    return section(config, "config", "model") or section(config, "model")


def has_images(config: Mapping[str, Any]) -> bool:
    """Whether a configuration is of a network with image codes, which UniDisc's is."""
    return any(key in dit_section(config) for key in ("image_vocab_size", "img_length", "modality_embed"))


ROPE_THETA = 1e4
DIT_SIZES = {
    "hidden_size": Argument("hidden_size", Width, 768),
    "n_blocks": Argument("num_layers", Depth, 12),
    "n_heads": Argument("num_heads", Depth, 12),
    "cond_dim": Argument("cond_dim", Width, 128),
    "dropout": Argument("dropout", Annotated[float, Between(0, 0.999)], 0.1),
}
DIT_FIXED = {
    "parameterization": ("subs",),
    "backbone": ("dit",),
    "diffusion": ("absorbing_state",),
    "type": ("ddit", "dit", None),
    "tie_word_embeddings": (False, None),
}
DIT_SETTINGS = {"activation": "gelu_tanh", "head_bias": True, "ffn_bias": True}
_SIZES = {**DIT_SIZES, "hidden_dim": Width, **dict.fromkeys(("length", "model_length"), Index | None)}
KEYS = ConfigKeys(
    "mdlm",
    used={
        **_SIZES,
        "model": Mapping[str, Any],
        "vocab_size": Rows | None,
        "time_conditioning": bool | None,
        **dict.fromkeys(("mask_index", "bos_token_id", "eos_token_id"), Index | None),
    },
    fixed=DIT_FIXED,
    harmless=("scale_by_sigma",),  # of another parameterisation
)


def mdlm_vocabulary(config: Config) -> Vocabulary:
    """Text ids with [MASK] last, or inside the range where the tokenizer has a mask token of its own; no images."""
    KEYS.check(config)
    size = config.get("vocab_size") or 50258
    mask_id = config.get("mask_index")
    mask_id = size - 1 if mask_id is None else mask_id
    specials = special_ids(config, "bos", "eos")
    if not specials and size == 50258:
        specials = {"eos": 50256}
    stop = mask_id if mask_id == size - 1 else size
    return Vocabulary(size, (0, stop), (stop, stop), mask_id, specials=specials)


def mdlm_settings(config: Config) -> dict[str, Any]:
    """`MaskedTransformer` arguments for an upstream configuration; a missing key takes upstream's default."""
    KEYS.check(config)
    model = config.get("model", config)
    inner = KEYS if model is config else ConfigKeys("mdlm (model)", _SIZES, fixed=DIT_FIXED, harmless=KEYS.harmless)
    taken = inner.read(model)
    taken["hidden_size"] = model.get("hidden_size", model.get("hidden_dim", taken["hidden_size"]))
    return {
        **taken,
        **DIT_SETTINGS,
        "vocab_size": mdlm_vocabulary(config).size,
        "ffn_size": 4 * taken["hidden_size"],
        "norm": "layer",
        "norm_eps": 1e-5,
        "rope": "1d",
        "rope_theta": ROPE_THETA,
        "modality_embedding": False,
        "time_conditioning": True,
        "constant_time": None if config.get("time_conditioning") else 0.0,
    }


def mdlm_keymap(model: MaskedTransformer, spelling: Spelling) -> KeyMap:
    """Names of a network with `mdlm_settings`."""
    head_dim = model.config["hidden_size"] // model.config["num_heads"]
    inv_freq = ROPE_THETA ** -(torch.arange(0, head_dim, 2).float() / head_dim)
    return KeyMap.of(model, DIT_NAMES, {"rotary_emb.inv_freq": inv_freq})


def mdlm_sampler(steps: int = 128) -> SamplerConfig:
    """Ancestral sampling with alpha_t = 1 - t (the log-linear noise of the paper) in so many steps, each of which is a pass
    only where it unmasks something.
    """
    return SamplerConfig(ModalityDecoding(steps=steps, rule="ancestral", schedule="linear"))


def _fits(config: Config) -> bool:
    named = config_names(config, "MDLM", model_type="mdlm")
    return named or ("n_blocks" in dit_section(config) and not has_images(config))


MDLM = Family(
    name="mdlm",
    keys=(DIT_KEY, r"^(backbone\.)?blocks\.0\.attn_qkv\.weight$"),
    fits=_fits,
    settings=mdlm_settings,
    keymap=mdlm_keymap,
    vocabulary=mdlm_vocabulary,
    vocabularies={"mdlm": mdlm_vocabulary({"vocab_size": 50258})},
    releases=(Release("mdlm", {"vocab_size": 50258}),),
    unstated=("hidden_size", "num_layers", "num_heads", "ffn_size", "cond_dim", "dropout"),
    tiny=Tiny({"model": TINY_SHAPE, "vocab_size": 24}, (1.01626, 2.68254, -3.26117, -0.327203)),
    prefix="backbone.",
    measured={"cond_dim": "sigma_map.mlp.0.weight"},  # which is not in every config
    averaged=True,
    constants=("backbone.rotary_emb.inv_freq",),
    layout=lambda released, texts: TextLayout(
        released.vocabulary, texts.encode, mdlm_sampler(), paced=True, left=False, family="mdlm"
    ),
)
