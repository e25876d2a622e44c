"""What the `DIT` networks of MDLM and UniDisc share: sections of their configurations and names of weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unidiff.families.checkpoint.config_keys import section
from unidiff.families.checkpoint.keymap import Entry, linear

TINY_SHAPE = {"hidden_size": 16, "n_blocks": 2, "n_heads": 2, "cond_dim": 8}
DIT_KEY = r"^(backbone\.)?vocab_embed\.embedding$"
TIME_ENTRIES = [*linear("embed_time.up", "sigma_map.mlp.0"), *linear("embed_time.down", "sigma_map.mlp.2")]


def dit_section(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The `model` section of an upstream experiment configuration, empty without one."""
    return section(config, "config", "model") or section(config, "model")


def has_images(config: Mapping[str, Any]) -> bool:
    """Whether a configuration is of a network with image codes, which UniDisc's is."""
    return any(key in dit_section(config) for key in ("image_vocab_size", "img_length", "modality_embed"))


def block_entries(time: bool) -> list[Entry]:
    """The second half of a block, after its second norm."""
    block = "blocks.{i}."
    return [
        *linear(f"{block}feed_forward.up", f"{block}mlp.0"),
        *linear(f"{block}feed_forward.down", f"{block}mlp.2"),
        *(linear(f"{block}ada_ln.linear", f"{block}adaLN_modulation") if time else ()),
    ]


def head_entries(time: bool) -> list[Entry]:
    """The final layer."""
    return [
        Entry("final_norm.weight", "output_layer.norm_final.weight"),
        Entry("output_weight", "output_layer.linear.weight"),
        Entry("output_bias", "output_layer.linear.bias"),
        *(linear("final_ada_ln.linear", "output_layer.adaLN_modulation") if time else ()),
    ]
