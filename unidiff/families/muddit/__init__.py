"""Muddit and Meissonic."""

from typing import Any

from unidiff.families.family import Config, Family, Release, Tiny, config_names
from unidiff.families.muddit.rows import MeissonicLayout, MudditLayout
from unidiff.families.muddit.weights import PUBLISHED, muddit_keymap, muddit_settings, muddit_vocabulary
from unidiff.models.mmdit import MMDiT

_KEYS = (r"^transformer_blocks\.0\.attn\.add_q_proj\.weight$", r"^mlm_layer\.conv1\.weight$")
_TINY = {
    "vocab_size": 20,
    "codebook_size": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "joint_attention_dim": 16,
    "pooled_projection_dim": 12,
    "axes_dims_rope": [4, 4, 4],
}
_CLASS, _OTHER = {"_class_name": "SymmetricTransformer2DModel"}, {"_class_name": "Transformer2DModel"}
_BOTH: dict[str, Any] = {
    "settings": muddit_settings,
    "keymap": muddit_keymap,
    "network": MMDiT,
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
    vocabularies={"muddit": muddit_vocabulary({})},
    layout=MudditLayout.of,
    releases=(Release("muddit", {**_CLASS, **PUBLISHED["muddit"]}, 1_057_540_096),),
    tiny=Tiny({**_CLASS, **_TINY, "tokenizer_vocab_size": 48}, (-0.00928485, 0.446267, -0.15253, -0.515088)),
    **_BOTH,
)
MEISSONIC = Family(
    name="meissonic",
    keys=_KEYS,
    fits=lambda config: _fits(config, "Transformer2DModel", words=False),
    layout=MeissonicLayout.of,
    releases=(Release("meissonic", {**_OTHER, **PUBLISHED["meissonic"]}),),
    tiny=Tiny({**_OTHER, **_TINY}, (-0.00921213, 0.157625, -0.15253, -0.218056)),
    **_BOTH,
)
