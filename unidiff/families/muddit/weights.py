"""Muddit (arXiv 2505.23606) and Meissonic (arXiv 2410.08261): their MM-DiT checkpoints, names, ids and conventions.

Conventions of the family: text and image ids have separate tables and heads; the text encoder is CLIP (its features
before the last layer, and its projected pooled vector); pixels of the `VQModel` are in [0, 1]; all padded text tokens
are attended to; the time given to the network follows one of `TIME_CONVENTIONS`, per checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from unidiff.checked import build_on_meta
from unidiff.families.checkpoint.config_keys import ConfigError, ConfigKeys
from unidiff.families.checkpoint.keymap import LAYER, Entry, KeyMap, assemble
from unidiff.models.mmdit import MMDiT
from unidiff.schema import Depth, Index, Layers, Rows, Width
from unidiff.tokens.vocabulary import Vocabulary

PREFIXES = ("module.", "_orig_mod.", "_orig_module.")
CLASSES = {"SymmetricTransformer2DModel": "muddit", "Transformer2DModel": "meissonic"}
CLIP_SIZE = 49408  # ids of the CLIP tokenizer; <|startoftext|> and <|endoftext|> are the last two
# our argument: upstream name, upstream default, type
FIELDS: dict[str, tuple[str, Any, Any]] = {
    "vocab_size": ("vocab_size", 8256, Rows),
    "codebook_size": ("codebook_size", 8192, Rows),
    "text_vocab_size": ("tokenizer_vocab_size", None, Rows | None),
    "num_layers": ("num_layers", 19, Layers),
    "num_single_layers": ("num_single_layers", 38, Layers),
    "num_heads": ("num_attention_heads", 24, Depth),
    "head_dim": ("attention_head_dim", 128, Width),
    "text_dim": ("joint_attention_dim", 4096, Width),
    "pooled_dim": ("pooled_projection_dim", 768, Width),
    "rope_axes": ("axes_dims_rope", (16, 56, 56), list[Index] | tuple[Index, ...]),
    "adapter_dim": ("t5_dim", None, Width | None),
    "downsample": ("downsample", False, bool),
}
KEYS = ConfigKeys(
    "Muddit",
    used={**{theirs: kind for theirs, _, kind in FIELDS.values()}, "upsample": bool},
    fixed={"guidance_embeds": (False, None), "patch_size": (1, None)},
    harmless={"in_channels": "of the network that this one was made from; codes have a table"},
    closed=True,
)
# What the published `transformer/config.json` files hold, under upstream's names.
PUBLISHED: dict[str, dict[str, Any]] = {
    "muddit": {
        "vocab_size": 8256,
        "codebook_size": 8192,
        "tokenizer_vocab_size": 49408,
        "t5_dim": None,
        "num_layers": 14,
        "num_single_layers": 28,
        "num_attention_heads": 8,
        "attention_head_dim": 128,
        "joint_attention_dim": 1024,
        "pooled_projection_dim": 1024,
        "axes_dims_rope": [16, 56, 56],
        "downsample": True,
        "upsample": True,
    }
}
PUBLISHED["meissonic"] = {k: v for k, v in PUBLISHED["muddit"].items() if k not in {"tokenizer_vocab_size", "t5_dim"}}


def load_muddit(
    state_dict: Mapping[str, Any],
    config: Mapping[str, Any],
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> tuple[MMDiT, Vocabulary]:
    """Model (evaluation mode) and vocabulary from the transformer's weights of a Muddit or Meissonic checkpoint.

    Args:
        state_dict: upstream names, possibly with `module.` or `_orig_mod.` prefixes or nested under `model`.
        config: the `config.json` beside them, upstream's names.
        dtype: cast the weights; None keeps the checkpoint's.
        device: where to load; None for the CPU.

    Raises:
        ValueError: an unknown config key or value, or weights left over, missing, misshaped or not finite.
    """
    kwargs = muddit_config(config)
    model = build_on_meta(MMDiT, kwargs)
    return assemble(model, muddit_keymap(kwargs), state_dict, dtype, device), muddit_vocabulary(config)


def muddit_state_dict(model: MMDiT) -> dict[str, Tensor]:
    """The model's weights under released names."""
    return muddit_keymap(model.config).to_theirs(model.state_dict())


def muddit_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """`MMDiT` arguments for an upstream configuration; a missing key takes upstream's default.

    Raises:
        ValueError: an unknown key, or an option that no released model uses.
    """
    KEYS.check(config)
    name = config.get("_class_name")
    if name is not None and name not in CLASSES:
        raise ConfigError(f"the config describes a {name}; expected one of {sorted(CLASSES)}")
    if config.get("downsample", False) != config.get("upsample", False):
        raise ConfigError("downsample and upsample differ, so logits would not fit the codes; set both or neither")
    return {ours: config.get(theirs, default) for ours, (theirs, default, _) in FIELDS.items()}


def muddit_vocabulary(config: Mapping[str, Any]) -> Vocabulary:
    """The two separate tables as one id space: text ids, text [MASK], then the image table with its [MASK] last.

    A checkpoint without a text head (Meissonic) reads CLIP ids all the same.
    """
    KEYS.check(config)
    text = config.get("tokenizer_vocab_size") or CLIP_SIZE
    rows, codes = config.get("vocab_size", 8256), config.get("codebook_size", 8192)
    start = text + 1
    specials = {"bos": text - 2, "eos": text - 1}
    return Vocabulary(start + rows, (0, text), (start, start + codes), text, start + rows - 1, specials)


def muddit_keymap(config: Mapping[str, Any]) -> KeyMap:
    """Names for a model made with `muddit_config` arguments (its `config` serves too)."""
    entries = [
        *_pairs(("adapter.weight", "adapter.1.weight") if config["adapter_dim"] is not None else ()),
        *_pairs(("embed_codes.weight", "embed.embeddings.weight")),
        *_pairs(("embed_norm.weight", "embed.layer_norm.weight"), ("embed_out.weight", "embed.conv.weight")),
        *_layer("condition_time.first", "time_text_embed.timestep_embedder.linear_1"),
        *_layer("condition_time.second", "time_text_embed.timestep_embedder.linear_2"),
        *_layer("condition_pooled.first", "time_text_embed.text_embedder.linear_1"),
        *_layer("condition_pooled.second", "time_text_embed.text_embedder.linear_2"),
        *_pairs(("embed_pooled.first.weight", "cond_embed.linear_1.weight")),
        *_pairs(("embed_pooled.second.weight", "cond_embed.linear_2.weight")),
        *_layer("embed_text", "context_embedder"),
        *_pairs(("text_norm.weight", "encoder_proj_layer_norm.weight")),
        *_pairs(("enter_norm.weight", "project_to_hidden_norm.weight"), ("enter.weight", "project_to_hidden.weight")),
        *(entry.at(i) for i in range(config["num_layers"]) for entry in _double_block(config)),
        *(entry.at(i) for i in range(config["num_single_layers"]) for entry in _single_block(config)),
        *_pairs(("text_out.weight", "text_decoder.1.weight") if config["text_vocab_size"] is not None else ()),
        *_pairs(("leave_norm.weight", "project_from_hidden_norm.weight")),
        *_pairs(("leave.weight", "project_from_hidden.weight")),
        *_pairs(("image_in.weight", "mlm_layer.conv1.weight"), ("image_norm.weight", "mlm_layer.layer_norm.weight")),
        *_pairs(("image_out.weight", "mlm_layer.conv2.weight")),
    ]
    if config["downsample"]:
        for ours, theirs in (("down", "down_block.downsample"), ("up", "up_block.upsample")):
            entries += _pairs(
                (f"{ours}_norm.weight", f"{theirs}.norm.weight"), (f"{ours}.weight", f"{theirs}.conv.weight")
            )
    return KeyMap(entries, layers=0, prefixes=PREFIXES)


def _double_block(config: Mapping[str, Any]) -> list[Entry]:
    entries = []
    names = {  # stream: adaLN, q k v, norms of q and k, output, feed-forward
        "text": ("norm1_context", "add_{}_proj", "norm_added_{}", "to_add_out", "ff_context"),
        "image": ("norm1", "to_{}", "norm_{}", "to_out.0", "ff"),
    }
    for stream, (norm, projection, head_norm, out, feed_forward) in names.items():
        ours, theirs = f"double_blocks.{LAYER}.{stream}", f"transformer_blocks.{LAYER}"
        entries += [
            *_layer(f"{ours}.ada_ln.linear", f"{theirs}.{norm}.linear"),
            *_heads(f"{ours}.heads", f"{theirs}.attn.{projection}", f"{theirs}.attn.{head_norm}", config),
            *_layer(f"{ours}.out", f"{theirs}.attn.{out}"),
            *_layer(f"{ours}.feed_forward.up", f"{theirs}.{feed_forward}.net.0.proj"),
            *_layer(f"{ours}.feed_forward.down", f"{theirs}.{feed_forward}.net.2"),
        ]
    return entries


def _single_block(config: Mapping[str, Any]) -> list[Entry]:
    ours, theirs = f"single_blocks.{LAYER}", f"single_transformer_blocks.{LAYER}"
    return [
        *_layer(f"{ours}.ada_ln.linear", f"{theirs}.norm.linear"),
        *_heads(f"{ours}.heads", f"{theirs}.attn.to_{{}}", f"{theirs}.attn.norm_{{}}", config),
        *_layer(f"{ours}.up", f"{theirs}.proj_mlp"),
        *_layer(f"{ours}.out", f"{theirs}.proj_out"),
    ]


def _heads(ours: str, projection: str, norm: str, config: Mapping[str, Any]) -> list[Entry]:
    size = config["num_heads"] * config["head_dim"]
    return [
        *(
            Entry(f"{ours}.qkv.{part}", tuple(f"{_fill(projection, x)}.{part}" for x in "qkv"), (size,) * 3)
            for part in ("weight", "bias")
        ),
        *(Entry(f"{ours}.{x}_norm.weight", f"{_fill(norm, x)}.weight") for x in "qk"),
    ]


def _fill(name: str, letter: str) -> str:
    return name.replace("{}", letter)


def _layer(ours: str, theirs: str) -> list[Entry]:
    return [Entry(f"{ours}.{part}", f"{theirs}.{part}") for part in ("weight", "bias")]


def _pairs(*pairs: tuple[str, str] | tuple[()]) -> list[Entry]:
    return [Entry(*pair) for pair in pairs if pair]
