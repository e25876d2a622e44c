"""Weight names that the `DIT` networks of MDLM and UniDisc share."""

from __future__ import annotations

from unidiff.families.checkpoint.keymap import Entry

TIME_ENTRIES = [
    Entry(f"embed_time.{ours}.{part}", f"sigma_map.mlp.{n}.{part}")
    for ours, n in (("up", 0), ("down", 2))
    for part in ("weight", "bias")
]


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
