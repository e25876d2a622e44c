"""MDLM."""

from unidiff.families.checkpoint.dit_names import DIT_KEY, dit_section, has_images
from unidiff.families.family import Family, config_names, denoiser
from unidiff.families.mdlm.weights import load_mdlm, mdlm_state_dict, mdlm_vocabulary

MDLM = Family(
    name="mdlm",
    keys=(DIT_KEY, r"^(backbone\.)?blocks\.0\.attn_qkv\.weight$"),
    fits=lambda config: (
        config_names(config, "MDLM", model_type="mdlm")
        or ("n_blocks" in dit_section(config) and not has_images(config))
    ),
    load=denoiser(load_mdlm),
    export=lambda model, spelling: mdlm_state_dict(model),
    vocabulary=mdlm_vocabulary,
    constants=("backbone.rotary_emb.inv_freq",),
)
