"""MDLM."""

from unidiff.families.checkpoint.dit import DIT_KEY, TINY_SHAPE, dit_section, has_images
from unidiff.families.family import Config, Family, Release, Tiny, config_names
from unidiff.families.mdlm.rows import mdlm_layout
from unidiff.families.mdlm.weights import mdlm_keymap, mdlm_measured, mdlm_settings, mdlm_vocabulary


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
    measured=mdlm_measured,
    averaged=True,
    constants=("backbone.rotary_emb.inv_freq",),
    layout=mdlm_layout,
)
