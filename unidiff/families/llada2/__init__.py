"""LLaDA2.0 and LLaDA2.1 (inclusionAI 2025): block-causal masked diffusion with a mixture of experts.

Conventions of the family: those of LLaDA-MoE (a norm of each head, rotary on a part of it, no bias, the logit at a position
predicts the token there); a router of sigmoids, whose bias only chooses; a token sees its own block of positions and earlier
ones, blocks counted from the first token of the prompt. Nothing in a config tells 2.0 from 2.1, which differ in how they are
decoded: 2.1 also replaces tokens of the current block (`llada2_sampler`). The network of LLaDA2.0-Uni (arXiv 2604.20796) is the same
with image codes behind the words, which share their [MASK] and their positions along the row.
"""

from __future__ import annotations

from typing import Annotated, Any

from unidiff.families.checkpoint.config_keys import Argument, ConfigError, ConfigKeys
from unidiff.families.checkpoint.expert_names import EXPERT_KEYS
from unidiff.families.checkpoint.keymap import KeyMap
from unidiff.families.checkpoint.llama import LLAMA_KEYS, llama_settings
from unidiff.families.family import Config, Family, Release, Spelling, Tiny, config_names
from unidiff.families.llada2.rows import BLOCK, llada2_layout, llada2_sampler
from unidiff.families.llada_moe import ling_vocabulary, llada_moe_spelling, mixture_keymap
from unidiff.models.transformer import MaskedTransformer
from unidiff.schema import Between, Depth, Epsilon, Index, Layers, Positive, Rows, Width
from unidiff.tokens import Vocabulary

ARCHITECTURES = ("LLaDA2MoeModelLM",)
MODEL_TYPES = ("llada2_moe", "llada2_moe_veomni")
KEYS = ConfigKeys(
    "llada2",
    used={
        **LLAMA_KEYS,
        "num_key_value_heads": Argument("num_kv_heads", Depth),
        "head_dim": Argument("head_size", Width | None, None),
        "intermediate_size": Argument("ffn_size", Width),
        "rms_norm_eps": Argument("norm_eps", Epsilon, 1e-6),
        "num_experts": Argument("num_experts", Depth),
        "num_experts_per_tok": Argument("experts_per_token", Depth),
        "moe_intermediate_size": Argument("expert_size", Width),
        "n_group": Argument("router_groups", Depth | None, 1),
        "topk_group": Argument("router_top_groups", Depth | None, 1),
        "routed_scaling_factor": Argument("router_scale", Positive | None, 1.0),
        "num_shared_experts": Index | None,
        "first_k_dense_replace": Layers | None,
        "use_qk_norm": bool | None,
        "block_length": Rows | None,
        "image_token_offset": Rows | None,
        "partial_rotary_factor": Annotated[float, Between(0, 1)] | None,
    },
    fixed={  # first the value that is built
        "hidden_act": ("silu",),
        "score_function": ("sigmoid", None),
        **dict.fromkeys(("norm_topk_prob", "moe_router_enable_expert_bias", "use_rmsnorm"), (True, None)),
        **dict.fromkeys(("use_bias", "use_qkv_bias", "norm_head", "use_sliding_window"), (False, None)),
        "using_split_qkv_in_self_attention": (False, None),
        "router_dtype": ("fp32", None),
        "num_nextn_predict_layers": (0, None),
    },
    harmless=(
        *("attention_dropout", "embedding_dropout", "output_dropout", "initializer_range"),  # of training
        *(
            "use_cache",
            "output_router_logits",
            "_moe_implementation",
            "moe_implementation",
        ),  # how fast, and what else is returned
        *(
            "rotary_dim",
            "max_window_layers",
            "sliding_window",
        ),  # says partial_rotary_factor again; without sliding windows
    ),
)


def llada2_vocabulary(config: Config) -> Vocabulary:
    """Words with [MASK] among them, and from `image_token_offset` on, where a config has one, image codes."""
    KEYS.check(config)
    words = ling_vocabulary({**config, "vocab_size": config.get("image_token_offset") or config["vocab_size"]})
    size, first = config["vocab_size"], words.size
    if first > size:
        raise ConfigError(f"config has image_token_offset = {first} of {size} ids; expected no more than that")
    return Vocabulary(size, (0, first), (first, size), words.mask_id, specials=words.specials)


def llada2_settings(config: Config) -> dict[str, Any]:
    """`MaskedTransformer` arguments for an upstream configuration; `ConfigError` for an option that is not built."""
    taken = KEYS.read(config)
    dense, share = config.get("first_k_dense_replace") or 0, config.get("partial_rotary_factor")
    return {
        **taken,
        "shared_expert_size": taken["expert_size"] * (config.get("num_shared_experts") or 0),
        "dense_layers": tuple(range(min(dense, taken["num_layers"]))),
        "router": "sigmoid",
        "router_bias": "selection",
        "router_normalised": taken["experts_per_token"] > 1,
        **llama_settings(config, 6e5),
        "qk_norm": "none" if config.get("use_qk_norm") is False else "head",
        "rope_share": 1.0 if share is None else float(share),
        "attention": "block_causal",
        "block_length": config.get("block_length") or BLOCK,
    }


NAMES = {
    "embed_tokens": "model.word_embeddings",
    "blocks.{i}.attention.qkv": "model.layers.{i}.attention.query_key_value",
    "blocks.{i}.attention.q_norm": "model.layers.{i}.attention.query_layernorm",
    "blocks.{i}.attention.k_norm": "model.layers.{i}.attention.key_layernorm",
    "blocks.{i}.attention.out": "model.layers.{i}.attention.dense",
    "blocks.{i}.feed_forward.up": "model.layers.{i}.mlp.{gate,up}_proj",
    "blocks.{i}.feed_forward.down": "model.layers.{i}.mlp.down_proj",
    "blocks.{i}.feed_forward.router": "model.layers.{i}.mlp.gate",
    "blocks.{i}.feed_forward.router.bias": "model.layers.{i}.mlp.gate.expert_bias",
    "blocks.{i}.feed_forward.shared.up": "model.layers.{i}.mlp.shared_experts.{gate,up}_proj",
    "blocks.{i}.feed_forward.shared.down": "model.layers.{i}.mlp.shared_experts.down_proj",
    "blocks.{i}.attention_norm": "model.layers.{i}.input_layernorm",
    "blocks.{i}.ffn_norm": "model.layers.{i}.post_attention_layernorm",
    "final_norm": "model.norm",
    "output_weight": "lm_head.weight",
}


def llada2_keymap(model: MaskedTransformer, spelling: Spelling) -> KeyMap:
    """Names of a network with `llada2_settings`."""
    copies = {"lm_head.weight": "model.word_embeddings.weight"} if model.config["tie_head"] else {}
    return mixture_keymap(model, spelling, NAMES, copies)


CONFIG: dict[str, Any] = {
    **dict(model_type="llada2_moe", architectures=["LLaDA2MoeModelLM"], hidden_size=2048, num_hidden_layers=20),
    **dict(num_attention_heads=16, num_key_value_heads=4, head_dim=128, intermediate_size=5120, vocab_size=157184),
    **dict(
        num_experts=256, num_experts_per_tok=8, n_group=8, topk_group=4, moe_intermediate_size=512, num_shared_experts=1
    ),
    **dict(routed_scaling_factor=2.5, first_k_dense_replace=1, partial_rotary_factor=0.5, rope_theta=600000.0),
    **dict(rms_norm_eps=1e-6, tie_word_embeddings=False, eos_token_id=156892, pad_token_id=156892),
}
RELEASES = (
    Release("llada2.0-mini", {**CONFIG, "max_position_embeddings": 16384}, 16_000_000_000, 0.03),
    Release("llada2.1-mini", {**CONFIG, "max_position_embeddings": 32768}, 16_000_000_000, 0.03),
)
_TINY: dict[str, Any] = {
    **dict(model_type="llada2_moe", hidden_size=16, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1),
    **dict(
        head_dim=12, intermediate_size=24, vocab_size=40, num_experts=8, num_experts_per_tok=2, n_group=4, topk_group=2
    ),
    **dict(moe_intermediate_size=8, num_shared_experts=1, routed_scaling_factor=2.5, first_k_dense_replace=1),
    **dict(partial_rotary_factor=0.5, rope_theta=6e5, mask_token_id=30, eos_token_id=29, block_length=4),
}
LLADA2 = Family(
    name="llada2",
    keys=(r"^model\.layers\.0\.attention\.query_key_value\.weight$", r"\.mlp\.gate\.expert_bias$", EXPERT_KEYS),
    fits=lambda config: config_names(config, *ARCHITECTURES) or config.get("model_type") in MODEL_TYPES,
    settings=llada2_settings,
    keymap=llada2_keymap,
    vocabulary=llada2_vocabulary,
    vocabularies={"llada2": llada2_vocabulary(CONFIG)},
    releases=RELEASES,
    tiny=Tiny(_TINY, (0.00528775, 0.333049, -0.414197, 0.432906)),
    spelling=llada_moe_spelling,
    layout=llada2_layout,
)

__all__ = ["LLADA2", "llada2_keymap", "llada2_layout", "llada2_sampler", "llada2_settings", "llada2_vocabulary"]
