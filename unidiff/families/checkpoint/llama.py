"""Networks that are built as Llama is, under transformers' names: what their configs, settings and weights have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unidiff.families.checkpoint.config_keys import Argument, plain_rope_theta
from unidiff.families.checkpoint.keymap import KeyMap, qkv_rows
from unidiff.models.transformer import MaskedTransformer
from unidiff.schema import Depth, Index, Positive, Rows, Width

LLAMA_KEYS: Mapping[str, Any] = {
    "hidden_size": Argument("hidden_size", Width),
    "num_hidden_layers": Argument("num_layers", Depth),
    "num_attention_heads": Argument("num_heads", Depth),
    "vocab_size": Argument("vocab_size", Rows),
    "num_key_value_heads": Depth | None,
    "tie_word_embeddings": Argument("tie_head", bool | None, False),
    "rope_theta": Positive | None,
    **dict.fromkeys(("rope_scaling", "rope_parameters"), Any),  # `plain_rope_theta` looks at these
    "max_position_embeddings": Index | None,
    **{f"{name}_token_id": Index | None for name in ("mask", "eos", "pad", "bos")},
}
"""Keys that are read, see `ConfigKeys.used`."""
LLAMA_NAMES: Mapping[str, str] = {
    "embed_tokens": "model.embed_tokens",
    "blocks.{i}.attention.qkv": "model.layers.{i}.self_attn.{q,k,v}_proj",
    "blocks.{i}.attention.out": "model.layers.{i}.self_attn.o_proj",
    "blocks.{i}.feed_forward.up": "model.layers.{i}.mlp.{gate,up}_proj",
    "blocks.{i}.feed_forward.down": "model.layers.{i}.mlp.down_proj",
    "blocks.{i}.attention_norm": "model.layers.{i}.input_layernorm",
    "blocks.{i}.ffn_norm": "model.layers.{i}.post_attention_layernorm",
    "final_norm": "model.norm",
    "output_weight": "lm_head.weight",
}
"""Of our network, and theirs."""


def llama_settings(config: Mapping[str, Any], rope_theta: float) -> dict[str, Any]:
    """What is the same in all of them: `MaskedTransformer` arguments; `rope_theta` where a config names none."""
    theta = plain_rope_theta(config, rope_theta)
    return dict(norm="rms", activation="swiglu", rope="1d", rope_theta=theta, modality_embedding=False)


def llama_keymap(model: MaskedTransformer, names: Mapping[str, str] = LLAMA_NAMES) -> KeyMap:
    """A table of names; a tied head is stored twice."""
    copies = {"lm_head.weight": "model.embed_tokens.weight"} if model.config["tie_head"] else {}
    return KeyMap.of(model, names, copies=copies, rows={"blocks.{i}.attention.qkv": qkv_rows(model.config)})
