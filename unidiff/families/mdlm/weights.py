"""MDLM (Sahoo et al. 2024, arXiv 2406.07524): text-only checkpoints of its `DIT` network.

The network's time is sigma = -log alpha(t); a model trained without time conditioning always sees sigma = 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import torch
from torch import Tensor

from unidiff.families.checkpoint.config_keys import ConfigKeys
from unidiff.families.checkpoint.dit_names import TIME_ENTRIES, head_entries
from unidiff.families.checkpoint.keymap import Entry, KeyMap, build, strip_prefixes, unwrap
from unidiff.models.transformer import MaskedTransformer
from unidiff.schema import Between, Depth, Index, Rows, Width
from unidiff.tokens.batch import TokenBatch
from unidiff.tokens.vocabulary import Modality, Vocabulary

PREFIXES = ("module.", "_orig_mod.", "_orig_module.", "backbone.")
ROPE_THETA = 1e4
# upstream name, name in the Hugging Face config, upstream's default
FIELDS = {
    "hidden_size": ("hidden_size", "hidden_dim", 768),
    "num_layers": ("n_blocks", "n_blocks", 12),
    "num_heads": ("n_heads", "n_heads", 12),
    "dropout": ("dropout", "dropout", 0.1),
    "cond_dim": ("cond_dim", "cond_dim", 128),
}
_SIZES = {
    **dict.fromkeys(("hidden_size", "hidden_dim", "cond_dim"), Width),
    **dict.fromkeys(("n_blocks", "n_heads"), Depth),
    "dropout": Annotated[float, Between(0, 0.999)],
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
    harmless={"scale_by_sigma": "of another parameterisation"},
)


def load_mdlm(
    state_dict: Mapping[str, Any],
    config: Mapping[str, Any],
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> tuple[MaskedTransformer, Vocabulary]:
    """Model and vocabulary from a released state dict, or a Lightning checkpoint, whose EMA weights are then used.

    Args:
        state_dict: upstream names, with or without `backbone.`; or the whole Lightning checkpoint with `state_dict`
            and `ema`.
        config: upstream's Hydra configuration or the Hugging Face one; plus `vocab_size` (50258 if absent) and
            `mask_index` (the last id if absent). `time_conditioning=True` makes the network use the time it is given.
        dtype: cast the weights; None keeps the checkpoint's.
        device: where to load; None for the CPU.

    Raises:
        ValueError: weights left over, missing or misshaped.
    """
    kwargs = mdlm_config(config)
    weights = strip_prefixes(unwrap(state_dict), PREFIXES)
    if "sigma_map.mlp.0.weight" in weights:  # the width of the condition is not in every config
        kwargs["cond_dim"] = next(iter(getattr(weights["sigma_map.mlp.0.weight"], "shape", ())), kwargs["cond_dim"])
    keymap = mdlm_keymap(kwargs)
    if ema := state_dict.get("ema"):
        shadow = ema.get("shadow_params") if isinstance(ema, Mapping) else None
        if not isinstance(shadow, list) or not all(hasattr(value, "shape") for value in shadow):
            raise ValueError("the checkpoint's ema holds no list shadow_params of weights; download it again")
        weights = {**weights, **ema_weights(shadow, keymap)}
    return build(kwargs, keymap, weights, dtype, device), mdlm_vocabulary(config)


def mdlm_state_dict(model: MaskedTransformer) -> dict[str, Tensor]:
    """The model's weights under released names (`backbone.*`)."""
    theirs = mdlm_keymap(model.config).to_theirs(model.state_dict())
    return {f"backbone.{name}": value for name, value in theirs.items()}


def ema_weights(shadow: list[Tensor], keymap: KeyMap) -> dict[str, Tensor]:
    """Names for a list of EMA weights, which is in the order of the upstream module's parameters."""
    names = keymap.names()
    if len(shadow) != len(names):
        raise ValueError(f"the checkpoint has {len(shadow)} EMA weights; the config asks for {len(names)}")
    return dict(zip(names, shadow, strict=True))


def mdlm_vocabulary(config: Mapping[str, Any]) -> Vocabulary:
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


def mdlm_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """`MaskedTransformer` arguments for an upstream configuration; a missing key takes upstream's default."""
    KEYS.check(config)
    model = config.get("model", config)
    ConfigKeys("mdlm (model)", _SIZES, fixed=_FIXED, harmless=KEYS.harmless).check(
        {key: value for key, value in model.items() if model is not config}
    )
    values = {ours: model.get(hydra, model.get(hub, default)) for ours, (hydra, hub, default) in FIELDS.items()}
    return {
        **values,
        "vocab_size": mdlm_vocabulary(config).size,
        "ffn_size": 4 * values["hidden_size"],
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


def mdlm_keymap(config: Mapping[str, Any]) -> KeyMap:
    """Names for a model made with `mdlm_config` arguments (its `config` serves too)."""
    block = [
        ("attention_norm.weight", "norm1.weight"),
        ("attention.qkv.weight", "attn_qkv.weight"),
        ("attention.out.weight", "attn_out.weight"),
        ("ffn_norm.weight", "norm2.weight"),
        *(
            (f"feed_forward.{ours}.{p}", f"mlp.{n}.{p}")
            for ours, n in (("up", 0), ("down", 2))
            for p in ("weight", "bias")
        ),
        *((f"ada_ln.linear.{p}", f"adaLN_modulation.{p}") for p in ("weight", "bias")),
    ]
    entries = [
        Entry("embed_tokens.weight", "vocab_embed.embedding"),
        *TIME_ENTRIES,
        *(Entry(f"blocks.{{i}}.{ours}", f"blocks.{{i}}.{theirs}") for ours, theirs in block),
        *head_entries(time=True),
    ]
    head_dim = config["hidden_size"] // config["num_heads"]
    inv_freq = ROPE_THETA ** -(torch.arange(0, head_dim, 2).float() / head_dim)
    return KeyMap(entries, config["num_layers"], PREFIXES, {"rotary_emb.inv_freq": inv_freq})


def mdlm_batch(ids: Tensor, attended: Tensor | None = None) -> TokenBatch:
    """Text ids `[B, L]` as a `TokenBatch`: all valid, as the network sees padding; unattended positions are given."""
    positions = torch.zeros(*ids.shape, 3, dtype=torch.long, device=ids.device)
    positions[..., 0] = torch.arange(ids.shape[1], device=ids.device)
    modality = torch.full_like(ids, int(Modality.TEXT))
    everywhere = torch.ones_like(ids, dtype=torch.bool)
    given = torch.zeros_like(everywhere) if attended is None else ~attended.bool()
    return TokenBatch(ids, modality, given, everywhere, positions, torch.zeros_like(ids))
