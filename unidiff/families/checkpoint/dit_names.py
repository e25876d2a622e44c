"""Weight names that the `DIT` networks of MDLM and UniDisc share."""

from __future__ import annotations

from unidiff.families.checkpoint.config_keys import section
from unidiff.families.checkpoint.keymap import Entry
from unidiff.families.family import Config

DIT_KEY = r"^(backbone\.)?vocab_embed\.embedding$"
TIME_ENTRIES = [
    Entry(f"embed_time.{ours}.{part}", f"sigma_map.mlp.{n}.{part}")
    for ours, n in (("up", 0), ("down", 2))
    for part in ("weight", "bias")
]


def dit_section(config: Config) -> Config:
    """The `model` section of an upstream experiment configuration, empty without one."""
    return section(config, "config", "model") or section(config, "model")


def has_images(config: Config) -> bool:
    """Whether a configuration is of a network with image codes, which UniDisc's is."""
    return any(key in dit_section(config) for key in ("image_vocab_size", "img_length", "modality_embed"))


def head_entries(time: bool) -> list[Entry]:
    """The final layer of the DiT networks of MDLM and UniDisc."""
    return [
        Entry("final_norm.weight", "output_layer.norm_final.weight"),
        Entry("output_weight", "output_layer.linear.weight"),
        Entry("output_bias", "output_layer.linear.bias"),
        *(
            Entry(f"final_ada_ln.linear.{part}", f"output_layer.adaLN_modulation.{part}")
            for part in ("weight", "bias")
            if time
        ),
    ]
