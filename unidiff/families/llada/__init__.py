"""LLaDA."""

from unidiff.families.chat import chat_layout
from unidiff.families.family import Family, Tiny
from unidiff.families.llada.published import RELEASES, TINY_CONFIG
from unidiff.families.llada.rows import LLADA_CHAT
from unidiff.families.llada.weights import LLADA_NAMES, llada_settings, llada_vocabulary

LLADA = Family(
    name="llada",
    fits=lambda config: "d_model" in config and "n_layers" in config,
    priority=-1,  # others have these settings and more
    settings=llada_settings,
    vocabulary=llada_vocabulary,
    vocabularies={"llada": llada_vocabulary(RELEASES[0].config)},
    releases=RELEASES,
    tiny=Tiny({"model_type": "llada", **TINY_CONFIG}, (0.00893976, 0.593655, 0.795968, -0.763248)),
    **LLADA_NAMES,
    layout=chat_layout(LLADA_CHAT, "llada"),
)
