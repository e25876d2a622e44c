"""MMaDA."""

from unidiff.families.family import Family, config_names
from unidiff.families.llada.weights import LLADA_NAMES
from unidiff.families.mmada.weights import load_mmada, mmada_vocabulary

MMADA = Family(
    name="mmada",
    fits=lambda config: config_names(config, "MMadaModelLM", model_type="mmada") or "new_vocab_size" in config,
    load=load_mmada,
    image_tokenizer="magvit",
    needs_config=False,
    vocabulary=lambda config: mmada_vocabulary(),
    **LLADA_NAMES,
)
