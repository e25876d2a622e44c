"""LLaDA-MoE (Zhu et al. 2025, arXiv 2509.24389): LLaDA with a mixture of experts, under Llama's names.

Conventions of the family: those of LLaDA (bidirectional, the logit at a position predicts the token there); a norm of each
head of queries and keys; a router that takes the best of a softmax over all experts as they are, without making their weights
add up to 1. Its configs say `model_type` "llada", as LLaDA's do; the names of their settings tell them apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any

from torch import Tensor

from unidiff.decoding.config import SamplerConfig
from unidiff.families.chat import ChatLayout, ChatTemplate, chat_layout
from unidiff.families.checkpoint.config_keys import Argument, ConfigError, ConfigKeys
from unidiff.families.checkpoint.expert_names import EXPERT_KEYS, expert_dims, expert_layout, expert_names
from unidiff.families.checkpoint.keymap import KeyMap, qkv_rows
from unidiff.families.checkpoint.llama import LLAMA_KEYS, LLAMA_NAMES, llama_settings
from unidiff.families.family import Config, Family, Release, Spelling, Tiny, copied_head, special_ids, text_vocabulary
from unidiff.families.layout import DecodeRequest, Prepared, check_compat
from unidiff.families.llada.rows import as_upstream, llada_sampler
from unidiff.models.transformer import MaskedTransformer
from unidiff.schema import Between, Depth, Epsilon, Index, Width
from unidiff.tokens import Vocabulary

RELEASED_ROWS = 157184
LING_IDS = {"mask": 156895, "eos": 156892, "pad": 156892}
"""Of the tokenizer of LLaDA-MoE and LLaDA2.x, where a config does not state them."""
Share = Annotated[float, Between(-1, 1)]
KEYS = ConfigKeys(
    "llada-moe",
    used={
        **LLAMA_KEYS,
        "rms_norm_eps": Argument("norm_eps", Epsilon, 1e-5),
        "num_experts": Argument("num_experts", Depth),
        "num_experts_per_tok": Argument("experts_per_token", Depth),
        "expert_intermediate_size": Argument("expert_size", Width),
        "shared_expert_intermediate_size": Argument("shared_expert_size", Index | None, 0),
        "norm_topk_prob": Argument("router_normalised", bool | None, False),
        "dense_intermediate_size": Index | None,
        "moe_layer_freq": list[Annotated[int, Between(0, 1)]] | Annotated[int, Between(0, 1)] | None,
        **dict.fromkeys(("moe_router_enable_expert_bias", "qk_layernorm"), bool | None),
        "partial_rotary_factor": Share | None,
    },
    fixed={  # first the value that is built
        "hidden_act": ("silu",),
        "moe_router_score_function": ("softmax", None),
        "routed_scaling_factor": (1, 1.0, None),
        **dict.fromkeys(("router_num_group", "router_topk_group"), (None, 0, 1)),
        **dict.fromkeys(("attention_bias", "clip_qkv"), (None, False)),
    },
    harmless=(
        *("attention_dropout", "initializer_range", "router_aux_loss_coef"),  # of training
        *("use_cache", "output_router_logits"),  # how fast, and what else is returned
    ),
)


def ling_vocabulary(config: Config) -> Vocabulary:
    """Text ids only, with [MASK] inside the range; ids that a config of the released size leaves out are the released ones."""
    known = LING_IDS if config["vocab_size"] == RELEASED_ROWS else {}
    ids = known | special_ids(config, "mask", "eos", "pad", "bos")
    return text_vocabulary(config["vocab_size"], ids, f"{LING_IDS['mask']} in the released models")


def llada_moe_vocabulary(config: Config) -> Vocabulary:
    KEYS.check(config)
    return ling_vocabulary(config)


def llada_moe_settings(config: Config) -> dict[str, Any]:
    """`MaskedTransformer` arguments for an upstream configuration; `ConfigError` for an option that is not built."""
    taken, layers = KEYS.read(config), config["num_hidden_layers"]
    frequency = config.get("moe_layer_freq", 1)
    mixed = [1 if frequency is None else frequency] * layers if not isinstance(frequency, list) else frequency
    if len(mixed) != layers:
        raise ConfigError(
            f"config has moe_layer_freq of {len(mixed)} layers and {layers} layers; give one number for each"
        )
    share = config.get("partial_rotary_factor")
    return {
        **taken,
        "num_kv_heads": config.get("num_key_value_heads") or taken["num_heads"],
        "ffn_size": config.get("dense_intermediate_size") or None,
        "dense_layers": tuple(i for i, one in enumerate(mixed) if not one),
        "router": "softmax",
        "router_bias": "weights" if config.get("moe_router_enable_expert_bias") else "none",
        **llama_settings(config, 5e4),
        "qk_norm": "head" if config.get("qk_layernorm") is not False else "none",
        "rope_share": 1.0 if share is None or share < 0 else float(share),  # -1 is upstream's way to leave it out
    }


NAMES = {
    **LLAMA_NAMES,
    "blocks.{i}.attention.q_norm": "model.layers.{i}.self_attn.q_norm",
    "blocks.{i}.attention.k_norm": "model.layers.{i}.self_attn.k_norm",
    "blocks.{i}.feed_forward.router": "model.layers.{i}.mlp.gate",
    "blocks.{i}.feed_forward.router.bias": "model.layers.{i}.mlp.expert_bias",
    "blocks.{i}.feed_forward.shared.up": "model.layers.{i}.shared_expert.{gate,up}_proj",
    "blocks.{i}.feed_forward.shared.down": "model.layers.{i}.shared_expert.down_proj",
}


def llada_moe_spelling(names: Iterable[str], config: Config) -> Spelling:
    """The layout of the experts; a tied head left out or not."""
    names = list(names)
    tied = copied_head(names, bool(config.get("tie_word_embeddings")), "lm_head.weight")
    return {"experts": expert_layout(names), **tied}


def mixture_keymap(
    model: MaskedTransformer, spelling: Spelling, names: dict[str, str], copies: dict[str, str]
) -> KeyMap:
    """A table of names, with those of the experts as they are spelled."""
    layout = spelling.get("experts", "apart")
    table = {**names, **expert_names(layout, model.config["num_experts"])}
    rows = {"blocks.{i}.attention.qkv": qkv_rows(model.config)}
    return KeyMap.of(model, table, copies=copies, rows=rows, dims=expert_dims(layout))


def llada_moe_keymap(model: MaskedTransformer, spelling: Spelling) -> KeyMap:
    """Names of a network with `llada_moe_settings`."""
    copies = {"lm_head.weight": "model.embed_tokens.weight"} if model.config["tie_head"] else {}
    return mixture_keymap(model, spelling, NAMES, copies)


LING_CHAT = ChatTemplate(
    opening=(),
    turn=("<role>", "{role}", "<end_role>", "{content}", "<role_end>"),
    answer=("<role>", "ASSISTANT", "<end_role>"),
    roles={"system": "SYSTEM", "user": "HUMAN", "assistant": "ASSISTANT"},
    system="detailed thinking off",
    end="role_end",
    sampler=llada_sampler,
    spelled={"role": "<role>", "end_role": "</role>", "role_end": "<|role_end|>"},
)


@dataclass(frozen=True)
class LLaDAMoELayout(ChatLayout):
    """LLaDA's rows.

    Args:
        compat: None, or "upstream" for the released program: it drops the attention mask, so that padding before the shorter
            prompts of a batch is seen; any id may be written, [MASK] too, which uses up quota.
    """

    compat: str | None = None

    def __post_init__(self) -> None:
        check_compat(self.compat)

    def prepared(self, pipe: Any, request: DecodeRequest, config: SamplerConfig, seeds: Tensor) -> Prepared:
        if self.compat is None:
            return super().prepared(pipe, request, config, seeds)
        return Prepared(pipe.transformer, request, as_upstream(config))

    def _go_on(self, prompts: Sequence[Sequence[int]], longest: int) -> DecodeRequest:
        if self.compat is not None:
            ids, most = self.vocabulary.specials, max(map(len, prompts))
            pad = ids.get("pad", ids.get("eos", 0))
            prompts = [[*[pad] * (most - len(prompt)), *prompt] for prompt in prompts]
        return super()._go_on(prompts, longest)


def llada_moe_layout(released: Any, texts: Any) -> LLaDAMoELayout:
    """The layout of a loaded model and its tokenizer."""
    made = chat_layout(LING_CHAT, "llada-moe")(released, texts)
    return LLaDAMoELayout(**{f.name: getattr(made, f.name) for f in fields(made)})


# What its paper states, and what follows from the stated sizes: 14.71 GB in all and 12.88 GB of experts, in bfloat16
CONFIG: dict[str, Any] = {
    **dict(
        hidden_size=2048, num_hidden_layers=16, num_attention_heads=16, num_key_value_heads=16, vocab_size=RELEASED_ROWS
    ),
    **dict(num_experts=64, num_experts_per_tok=8, expert_intermediate_size=1024, norm_topk_prob=False),
    **dict(rope_theta=50000.0, qk_layernorm=True, tie_word_embeddings=False),
}
RELEASES = tuple(
    Release(name, CONFIG, 7_360_000_000, 5e-3) for name in ("llada-moe-7b-a1b-base", "llada-moe-7b-a1b-instruct")
)
_TINY: dict[str, Any] = {
    **dict(model_type="llada", hidden_size=16, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1),
    **dict(dense_intermediate_size=24, expert_intermediate_size=12, shared_expert_intermediate_size=8, num_experts=6),
    **dict(num_experts_per_tok=2, moe_layer_freq=[0, 1, 1], norm_topk_prob=False, partial_rotary_factor=0.5),
    **dict(vocab_size=40, mask_token_id=30, eos_token_id=29, rope_theta=5e4),
}
LLADA_MOE = Family(
    name="llada-moe",
    keys=(r"^model\.layers\.0\.self_attn\.q_proj\.weight$", r"\.self_attn\.q_norm\.weight$", EXPERT_KEYS),
    fits=lambda config: "expert_intermediate_size" in config and "num_experts" in config,
    settings=llada_moe_settings,
    keymap=llada_moe_keymap,
    vocabulary=llada_moe_vocabulary,
    vocabularies={"llada-moe": llada_moe_vocabulary(CONFIG)},
    releases=RELEASES,
    unstated=("norm_eps", "rope_share", "ffn_size"),
    tiny=Tiny(_TINY, (0.02807, 0.639869, 0.331912, -0.194533)),
    spelling=llada_moe_spelling,
    layout=llada_moe_layout,
)
