"""MDLM (Sahoo et al. 2024, arXiv 2406.07524): text-only checkpoints of its `DIT` network.

The network's time is sigma = -log alpha(t); a model trained without time conditioning always sees sigma = 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch

from unidiff.families.checkpoint.config_keys import Argument, ConfigKeys
from unidiff.families.checkpoint.dit import TIME_ENTRIES, block_entries, head_entries
from unidiff.families.checkpoint.keymap import Entry, KeyMap, per_layer
from unidiff.families.family import Config, Spelling
from unidiff.models.transformer import MaskedTransformer
from unidiff.schema import Between, Depth, Index, Rows, Width
from unidiff.tokens.vocabulary import Vocabulary

ROPE_THETA = 1e4
_SIZES = {
    "hidden_size": Argument("hidden_size", Width, 768),
    "hidden_dim": Width,  # the same in the Hugging Face config
    "n_blocks": Argument("num_layers", Depth, 12),
    "n_heads": Argument("num_heads", Depth, 12),
    "cond_dim": Argument("cond_dim", Width, 128),
    "dropout": Argument("dropout", Annotated[float, Between(0, 0.999)], 0.1),
    **dict.fromkeys(("length", "model_length"), Index | None),
}
_FIXED = {
    "parameterization": ("subs",),
    "backbone": ("dit",),
    "diffusion": ("absorbing_state",),
    "type": ("ddit", "dit", None),
    "tie_word_embeddings": (False, None),
}
KEYS = ConfigKeys(
    "mdlm",
    used={
        **_SIZES,
        "model": Mapping[str, Any],
        "vocab_size": Rows | None,
        "mask_index": Index | None,
        "time_conditioning": bool | None,
        "bos_token_id": Index | None,
        "eos_token_id": Index | None,
    },
    fixed=_FIXED,
    harmless=("scale_by_sigma",),  # of another parameterisation
)


def mdlm_measured(weights: Mapping[str, Any]) -> dict[str, Any]:
    """The width of the condition, which is not in every config."""
    shape: Sequence[int] = getattr(weights.get("sigma_map.mlp.0.weight"), "shape", ())
    return {"cond_dim": shape[0]} if len(shape) else {}


def mdlm_vocabulary(config: Config) -> Vocabulary:
    """Text ids with [MASK] last, or inside the range where the tokenizer has a mask token of its own; no images."""
    KEYS.check(config)
    size = config.get("vocab_size") or 50258
    mask_id = config.get("mask_index")
    mask_id = size - 1 if mask_id is None else mask_id
    specials = {
        name: config[f"{name}_token_id"] for name in ("bos", "eos") if config.get(f"{name}_token_id") is not None
    }
    if not specials and size == 50258:
        specials = {"eos": 50256}
    stop = mask_id if mask_id == size - 1 else size
    return Vocabulary(size, (0, stop), (stop, stop), mask_id, specials=specials)


def mdlm_settings(config: Config) -> dict[str, Any]:
    """`MaskedTransformer` arguments for an upstream configuration; a missing key takes upstream's default."""
    KEYS.check(config)
    model = config.get("model", config)
    inner = KEYS if model is config else ConfigKeys("mdlm (model)", _SIZES, fixed=_FIXED, harmless=KEYS.harmless)
    taken = inner.read(model)
    taken["hidden_size"] = model.get("hidden_size", model.get("hidden_dim", taken["hidden_size"]))
    return {
        **taken,
        "vocab_size": mdlm_vocabulary(config).size,
        "ffn_size": 4 * taken["hidden_size"],
        "norm": "layer",
        "norm_eps": 1e-5,
        "activation": "gelu_tanh",
        "rope": "1d",
        "rope_theta": ROPE_THETA,
        "modality_embedding": False,
        "time_conditioning": True,
        "constant_time": None if config.get("time_conditioning", False) else 0.0,
        "head_bias": True,
        "ffn_bias": True,
    }


def mdlm_keymap(model: MaskedTransformer, spelling: Spelling) -> KeyMap:
    """Names of a network with `mdlm_settings`."""
    config = model.config
    block = [
        Entry("blocks.{i}.attention_norm.weight", "blocks.{i}.norm1.weight"),
        Entry("blocks.{i}.attention.qkv.weight", "blocks.{i}.attn_qkv.weight"),
        Entry("blocks.{i}.attention.out.weight", "blocks.{i}.attn_out.weight"),
        Entry("blocks.{i}.ffn_norm.weight", "blocks.{i}.norm2.weight"),
    ]
    entries = [
        Entry("embed_tokens.weight", "vocab_embed.embedding"),
        *TIME_ENTRIES,
        *per_layer(config["num_layers"], [*block, *block_entries(time=True)]),
        *head_entries(time=True),
    ]
    head_dim = config["hidden_size"] // config["num_heads"]
    inv_freq = ROPE_THETA ** -(torch.arange(0, head_dim, 2).float() / head_dim)
    return KeyMap(entries, {"rotary_emb.inv_freq": inv_freq})
