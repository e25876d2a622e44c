"""Muddit and Meissonic."""

from typing import Any

from unidiff.families.family import Config, Family, config_names, denoiser
from unidiff.families.muddit.weights import load_muddit, muddit_state_dict, muddit_vocabulary

_KEYS = (r"^transformer_blocks\.0\.attn\.add_q_proj\.weight$", r"^mlm_layer\.conv1\.weight$")
_BOTH: dict[str, Any] = {
    "load": denoiser(load_muddit),
    "export": lambda model, spelling: muddit_state_dict(model),
    "vocabulary": muddit_vocabulary,
    "image_tokenizer": "vq_model",
}


def _fits(config: Config, name: str, words: bool) -> bool:
    """By the class, or without one by the settings: a head for words or none."""
    if "_class_name" in config:
        return config_names(config, name)
    return "axes_dims_rope" in config and ("tokenizer_vocab_size" in config) == words


MUDDIT = Family(
    name="muddit",
    keys=(*_KEYS, r"^text_decoder\.1\.weight$"),
    fits=lambda config: _fits(config, "SymmetricTransformer2DModel", words=True),
    **_BOTH,
)
MEISSONIC = Family(
    name="meissonic", keys=_KEYS, fits=lambda config: _fits(config, "Transformer2DModel", words=False), **_BOTH
)
