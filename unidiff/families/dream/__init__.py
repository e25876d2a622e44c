"""Dream, and DiffuCoder and Dream-Coder, which have its network."""

from unidiff.families.chat import chat_layout
from unidiff.families.dream.rows import DREAM_CHAT
from unidiff.families.dream.weights import RELEASED, dream_keymap, dream_settings, dream_vocabulary
from unidiff.families.family import Family, Release, Tiny, config_names, copied_head

_TINY = {
    "model_type": "Dream",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 40,
    "mask_token_id": 30,
    "eos_token_id": 29,
}

DREAM = Family(
    name="dream",
    keys=(r"^model\.layers\.0\.self_attn\.q_proj\.bias$", r"^model\.layers\.0\.mlp\.gate_proj\.weight$"),
    fits=lambda config: config_names(config, "DreamModel", model_type="Dream"),
    settings=dream_settings,
    keymap=dream_keymap,
    vocabulary=dream_vocabulary,
    releases=(Release("dream-7b", RELEASED, 7_000_000_000, 0.1),),
    tiny=Tiny(_TINY, (-0.00032345, 0.655732, 0.520323, -0.905635)),
    spelling=lambda names, config: copied_head(names, bool(config.get("tie_word_embeddings")), "lm_head.weight"),
    layout=chat_layout(DREAM_CHAT, "dream"),
)
