"""Dream (Ye et al. 2025, arXiv 2508.15487): masked diffusion weights that started as Qwen2.5, under Qwen2's names.

Conventions of the family: pre-norm, RMSNorm, grouped keys, biases on queries, keys and values only, rotary by index, no
time; attention is bidirectional and the logits at a token predict the next one (`MaskedTransformer(shift=True)`).
DiffuCoder and Dream-Coder have the same network.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unidiff.decoding.config import ModalityDecoding, SamplerConfig
from unidiff.families.chat import ChatTemplate, chat_layout
from unidiff.families.checkpoint.config_keys import Argument, ConfigError, ConfigKeys
from unidiff.families.checkpoint.keymap import KeyMap
from unidiff.families.checkpoint.llama import LLAMA_KEYS, llama_keymap, llama_settings
from unidiff.families.family import (
    Config,
    Family,
    Release,
    Spelling,
    Tiny,
    config_names,
    copied_head,
    special_ids,
    text_vocabulary,
)
from unidiff.models.transformer import MaskedTransformer
from unidiff.schema import Epsilon, Width
from unidiff.tokens import Vocabulary

# upstream's fields of the 7B checkpoints
RELEASED: Mapping[str, Any] = {
    **dict(hidden_size=3584, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4),
    **dict(intermediate_size=18944, vocab_size=152064, rms_norm_eps=1e-6, rope_theta=1e6, tie_word_embeddings=False),
    **dict(mask_token_id=151666, pad_token_id=151643, eos_token_id=151643),
}
KEYS = ConfigKeys(
    "dream",
    used={
        **LLAMA_KEYS,
        "intermediate_size": Argument("ffn_size", Width),
        "rms_norm_eps": Argument("norm_eps", Epsilon, 1e-6),
        "head_dim": Width | None,
    },
    fixed={  # first the value that is built
        "hidden_act": ("silu",),
        "full_attn_mask": (None, False, True),
        "attention_bias": (True, None),  # of queries, keys and values
        **dict.fromkeys(("use_sliding_window", "use_mrope", "mlp_bias"), (False, None)),
    },
    harmless=(
        *("sliding_window", "max_window_layers", "layer_types"),  # without use_sliding_window
        *("attention_dropout", "initializer_range"),  # of training
        "use_cache",  # how fast, not what
    ),
)


def dream_vocabulary(config: Config) -> Vocabulary:
    """Text ids only, with [MASK] inside the range."""
    KEYS.check(config)
    size, specials = config["vocab_size"], special_ids(config, "mask", "eos", "pad", "bos")
    if size == RELEASED["vocab_size"]:
        specials |= DREAM_CHAT.marks  # in no config
    return text_vocabulary(size, specials, "151666 in the 7B models")


def dream_settings(config: Config) -> dict[str, Any]:
    """`MaskedTransformer` arguments for an upstream configuration; `ConfigError` for an option that is not built."""
    taken = KEYS.read(config)
    if config.get("head_dim") not in (None, taken["hidden_size"] // taken["num_heads"]):
        raise ConfigError(f"config has head_dim = {config['head_dim']}; only hidden_size / heads is supported")
    return {
        **taken,
        "num_kv_heads": config.get("num_key_value_heads") or taken["num_heads"],
        **llama_settings(config, RELEASED["rope_theta"]),
        "qkv_bias": True,
        "shift": True,
    }


def dream_keymap(model: MaskedTransformer, spelling: Spelling) -> KeyMap:
    """Names of a network with `dream_settings`."""
    return llama_keymap(model)


def dream_sampler(steps: int = 512, temperature: float = 0.2, top_p: float | None = 0.95) -> SamplerConfig:
    """Upstream's recommended settings: a linear schedule, positions ranked by the entropy of their distribution.

    (Confidences are those of the model here, upstream those after temperature and top_p.)
    """
    text = ModalityDecoding(steps, "quota", "linear", confidence="entropy", temperature=temperature, top_p=top_p)
    return SamplerConfig(text=text)


DREAM_CHAT = ChatTemplate(
    marks={"im_start": 151644, "im_end": 151645},
    turn=("<im_start>", "{role}\n{content}", "<im_end>", "\n"),
    answer=("<im_start>", "assistant\n"),
    system="You are a helpful assistant.",
    end="im_end",
    sampler=lambda vocabulary: dream_sampler(),
    spelled={"im_start": "<|im_start|>", "im_end": "<|im_end|>"},
)


_TINY: dict[str, Any] = {
    **dict(model_type="Dream", hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2),
    **dict(intermediate_size=24, vocab_size=40, mask_token_id=30, eos_token_id=29),
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
