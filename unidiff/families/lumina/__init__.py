"""Lumina-DiMOO."""

from unidiff.families.family import Family, config_names
from unidiff.families.llada.weights import LLADA_NAMES
from unidiff.families.lumina.weights import load_lumina
from unidiff.tokens.vocabulary import Vocabulary

LUMINA = Family(
    name="lumina",
    fits=lambda config: config_names(config, "LLaDAForMultiModalGeneration"),
    load=load_lumina,
    image_tokenizer="vq_model",
    vocabulary=lambda config: Vocabulary.named("lumina"),
    **LLADA_NAMES,
)
