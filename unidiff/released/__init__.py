"""Released model families: per family a key map both ways, a config map and a vocabulary.

`load_released` reads any of them; `FAMILIES` is their registry. `unidiff.released.convert`, `.describe` and `.verify` are the
commands `unidiff convert`, `info` and `verify`.
"""

from unidiff.released.dream import dream_state_dict, load_dream
from unidiff.released.families import FAMILIES, Family
from unidiff.released.llada import llada_batch, llada_state_dict, load_llada
from unidiff.released.llamagen import llamagen_state_dict, load_llamagen
from unidiff.released.loading import Released, load_released
from unidiff.released.magvit import load_magvit, magvit_state_dict
from unidiff.released.mdlm import load_mdlm, mdlm_batch, mdlm_state_dict
from unidiff.released.mmada import load_mmada, mmada_state_dict
from unidiff.released.muddit import load_muddit, muddit_state_dict
from unidiff.released.small_memory import offload, quantise
from unidiff.released.unidisc import load_unidisc, unidisc_batch, unidisc_state_dict

__all__ = [
    "FAMILIES",
    "Family",
    "Released",
    "dream_state_dict",
    "llada_batch",
    "llada_state_dict",
    "llamagen_state_dict",
    "load_dream",
    "load_llada",
    "load_llamagen",
    "load_magvit",
    "load_mdlm",
    "load_mmada",
    "load_muddit",
    "load_released",
    "load_unidisc",
    "magvit_state_dict",
    "mdlm_batch",
    "mdlm_state_dict",
    "mmada_state_dict",
    "muddit_state_dict",
    "offload",
    "quantise",
    "unidisc_batch",
    "unidisc_state_dict",
]
