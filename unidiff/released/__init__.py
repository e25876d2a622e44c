"""Released model families: per family a key map both ways, a config map and a vocabulary."""

from unidiff.released.mdlm import load_mdlm, mdlm_batch, mdlm_state_dict
from unidiff.released.muddit import load_muddit, muddit_state_dict
from unidiff.released.unidisc import load_unidisc, unidisc_batch, unidisc_state_dict

__all__ = [
    "load_mdlm",
    "load_muddit",
    "load_unidisc",
    "mdlm_batch",
    "mdlm_state_dict",
    "muddit_state_dict",
    "unidisc_batch",
    "unidisc_state_dict",
]
