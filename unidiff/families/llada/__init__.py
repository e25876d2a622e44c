"""LLaDA, and what the families with its network share."""

from unidiff.families.family import Family
from unidiff.families.llada.weights import LLADA_NAMES, llada_vocabulary, load_llada

LLADA = Family(
    name="llada",
    fits=lambda config: "d_model" in config and "n_layers" in config,
    priority=-1,  # others have these settings and more
    load=load_llada,
    vocabulary=llada_vocabulary,
    **LLADA_NAMES,
)
