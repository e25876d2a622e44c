"""Lumina-DiMOO (arXiv 2510.06308): LLaDA's network under LLaDA's names, with images between newlines.

An image of h x w codes is h rows of w codes, each followed by a newline id, in one text-like sequence.
"""

from unidiff.families.family import Family, Release, Tiny, config_names
from unidiff.families.llada.published import CONFIG, EIGHT_BILLION, TINY_CONFIG
from unidiff.families.llada.weights import LLADA_NAMES, llada_settings
from unidiff.tokens.vocabulary import Vocabulary

_IDS = Vocabulary.named("lumina")
_CONFIG = {**CONFIG, "vocab_size": _IDS.size, "embedding_size": _IDS.size}

LUMINA = Family(
    name="lumina",
    fits=lambda config: config_names(config, "LLaDAForMultiModalGeneration"),
    settings=llada_settings,
    vocabulary=lambda config: _IDS,
    image_tokenizer="vq_model",
    releases=(Release("lumina-dimoo", _CONFIG, *EIGHT_BILLION),),
    tiny=Tiny(
        {"architectures": ["LLaDAForMultiModalGeneration"], **TINY_CONFIG},
        (0.0689936, 0.748344, 0.741017, 0.978048),
        Vocabulary(40, (0, 20), (24, 40), 21, specials={"eos": 19}),
    ),
    **LLADA_NAMES,
)
