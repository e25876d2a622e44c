"""Released model families: per family a key map both ways, a config map and a vocabulary.

`load_released` reads any of them; `FAMILIES` is their registry. `unidiff.families.checkpoint.convert`, `.describe` and `.verify` are the
commands `unidiff convert`, `info` and `verify`.
"""

from unidiff.families.checkpoint.load import Released, load_released
from unidiff.families.checkpoint.small_memory import offload, quantise
from unidiff.families.dream.weights import dream_state_dict, load_dream
from unidiff.families.family import Family
from unidiff.families.image_tokenizers.llamagen import llamagen_state_dict, load_llamagen
from unidiff.families.image_tokenizers.magvit import load_magvit, magvit_state_dict
from unidiff.families.llada.weights import llada_batch, llada_state_dict, load_llada
from unidiff.families.mdlm.weights import load_mdlm, mdlm_batch, mdlm_state_dict
from unidiff.families.mmada.weights import load_mmada, mmada_state_dict
from unidiff.families.muddit.weights import load_muddit, muddit_state_dict
from unidiff.families.registry import FAMILIES
from unidiff.families.unidisc.weights import load_unidisc, unidisc_batch, unidisc_state_dict

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
