"""MMaDA."""

from unidiff.families.family import Family, Release, Tiny, config_names
from unidiff.families.llada.published import EIGHT_BILLION, TINY_CONFIG
from unidiff.families.llada.weights import LLADA_NAMES
from unidiff.families.mmada.rows import MMaDALayout
from unidiff.families.mmada.weights import RELEASED, mmada_settings, mmada_vocabulary

MMADA = Family(
    name="mmada",
    fits=lambda config: config_names(config, "MMadaModelLM", model_type="mmada") or "new_vocab_size" in config,
    settings=mmada_settings,
    default_config=lambda names: RELEASED,
    vocabulary=lambda config: mmada_vocabulary(),
    vocabularies={"mmada": mmada_vocabulary()},
    image_tokenizer="magvit",
    releases=(Release("mmada-8b", RELEASED, *EIGHT_BILLION),),
    tiny=Tiny(
        {**TINY_CONFIG, "new_vocab_size": 40},
        (0.0315275, 0.731748, 0.736357, 0.731374),
        mmada_vocabulary(40, 24, 16, 21, {"eos": 19}),
    ),
    **LLADA_NAMES,
    layout=MMaDALayout.of,
)
