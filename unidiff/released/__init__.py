"""Released model families: per family a key map both ways, a config map and a vocabulary."""

from unidiff.released.llada import llada_batch, llada_state_dict, load_llada
from unidiff.released.llamagen import llamagen_state_dict, load_llamagen
from unidiff.released.magvit import load_magvit, magvit_state_dict
from unidiff.released.mdlm import load_mdlm, mdlm_batch, mdlm_state_dict
from unidiff.released.mmada import load_mmada, mmada_state_dict
from unidiff.released.muddit import load_muddit, muddit_state_dict
from unidiff.released.unidisc import load_unidisc, unidisc_batch, unidisc_state_dict

__all__ = [
    "llada_batch",
    "llada_state_dict",
    "llamagen_state_dict",
    "load_llada",
    "load_llamagen",
    "load_magvit",
    "load_mdlm",
    "load_mmada",
    "load_muddit",
    "load_unidisc",
    "magvit_state_dict",
    "mdlm_batch",
    "mdlm_state_dict",
    "mmada_state_dict",
    "muddit_state_dict",
    "unidisc_batch",
    "unidisc_state_dict",
]
