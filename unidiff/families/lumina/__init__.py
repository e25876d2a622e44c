"""Lumina-DiMOO (arXiv 2510.06308): LLaDA's network under LLaDA's names, with images between newlines.

An image of h x w codes is h rows of w codes, each followed by a newline id, in one text-like sequence.
"""

from unidiff.families.family import Family, Release, Tiny, config_names
from unidiff.families.llada.published import CONFIG, EIGHT_BILLION, TINY_CONFIG
from unidiff.families.llada.weights import LLADA_NAMES, llada_settings
from unidiff.families.lumina.rows import LuminaLayout
from unidiff.tokens.vocabulary import Vocabulary

# image codes behind LLaDA's text ids; the specials in between are prompt tokens, never targets
LUMINA_VOCABULARY = Vocabulary(
    size=134656,
    text=(0, 126356),
    image=(126356, 134548),
    mask_id=126336,
    specials={
        "eos": 126081,
        "newline": 126084,
        "answer_pad": 126339,
        "boi": 126349,
        "eoi": 126350,
        "uncondition": 126351,
        "answer": 126354,
        "end_answer": 126355,
    },
)
_CONFIG = {**CONFIG, "vocab_size": LUMINA_VOCABULARY.size, "embedding_size": LUMINA_VOCABULARY.size}

LUMINA = Family(
    name="lumina",
    fits=lambda config: config_names(config, "LLaDAForMultiModalGeneration"),
    settings=llada_settings,
    vocabulary=lambda config: LUMINA_VOCABULARY,
    vocabularies={"lumina": LUMINA_VOCABULARY},
    image_tokenizer="vq_model",
    releases=(Release("lumina-dimoo", _CONFIG, *EIGHT_BILLION),),
    tiny=Tiny(
        {"architectures": ["LLaDAForMultiModalGeneration"], **TINY_CONFIG},
        (0.0689936, 0.748344, 0.741017, 0.978048),
        Vocabulary(40, (0, 20), (24, 40), 21, specials={"eos": 19}),
    ),
    **LLADA_NAMES,
    layout=LuminaLayout.of,
)
