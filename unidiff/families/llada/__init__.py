"""LLaDA (Nie et al. 2025, arXiv 2502.09992): checkpoints of its bidirectional Llama network, and what descends from it.

Conventions of the family: pre-norm, RMSNorm, rotary by index in the row, no time, the logit at a position predicts the
token at that position; end-of-text fill is visible and a target. MMaDA and Lumina-DiMOO use the same names and add image
codes to the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any

from unidiff.families.chat import chat_layout
from unidiff.families.checkpoint.config_keys import Argument, ConfigError, ConfigKeys
from unidiff.families.checkpoint.keymap import KeyMap, qkv_rows
from unidiff.families.checkpoint.llama import llama_settings
from unidiff.families.family import Config, Family, Release, Spelling, Tiny, copied_head, special_ids, text_vocabulary
from unidiff.families.llada.rows import LLADA_CHAT
from unidiff.models.transformer import MaskedTransformer
from unidiff.schema import Between, Depth, Epsilon, Index, Positive, Rows, Width
from unidiff.tokens import Vocabulary

ROWS_8B = 126464
EOT_8B = 126348  # end of turn; in no released config
MLP_RATIO = 4  # upstream's default
KEYS = ConfigKeys(
    "llada",
    used={
        "d_model": Argument("hidden_size", Width),
        "n_heads": Argument("num_heads", Depth),
        "n_layers": Argument("num_layers", Depth),
        "rms_norm_eps": Argument("norm_eps", Epsilon, 1e-5),
        "mlp_hidden_size": Width | None,
        "mlp_ratio": Annotated[float, Between(1e-3, 1e3)],
        "rope_theta": Positive,
        **dict.fromkeys(("rope_scaling", "rope_parameters"), Any),  # `plain_rope_theta` looks at these
        **dict.fromkeys(("vocab_size", "new_vocab_size"), Rows),
        **dict.fromkeys(("n_kv_heads", "block_group_size"), Depth | None),
        **dict.fromkeys(("embedding_size", "max_sequence_length", "num_vq_tokens"), Index | None),
        **{f"{name}_token_id": Index | None for name in ("mask", "eos", "pad", "eot", "bos")},
        "weight_tying": Argument("tie_head", bool | None, False),
        "include_bias": Argument("linear_bias", bool | None, False),
        **dict.fromkeys(("include_qkv_bias", "attention_layer_norm", "multi_query_attention"), bool | None),
    },
    fixed={  # first the value that is built
        "activation_type": ("silu",),  # silu(ff_proj) * up_proj, nothing halved
        "block_type": ("llama",),
        "layer_norm_type": ("rms",),
        "layer_norm_with_affine": (True,),
        "attention_layer_norm_with_affine": (True, None),
        "rope": (True,),
        "clip_qkv": (None,),
        **dict.fromkeys(("bias_for_layer_norm", "alibi", "input_emb_norm", "scale_logits"), (False, None)),
    },
    harmless=(
        *("attention_dropout", "residual_dropout", "embedding_dropout"),  # off when a model is used
        *("init_fn", "init_std", "init_cutoff_factor", "init_device"),  # only before training
        *("flash_attention", "use_cache", "precision"),  # how fast, not what
        "alibi_bias_max",  # without alibi
        "rope_full_precision",  # positions are always turned in float32 here
        "tie_word_embeddings",  # upstream ties by weight_tying alone
        "llm_vocab_size",  # of the text part, which the id layout says
        "w_clip_vit",  # a second input of training runs; the network is the same
    ),
)


def llada_spelling(names: Iterable[str], config: Config) -> Spelling:
    """Layers as `blocks.N` or `block_groups.G.N`, projections apart or fused (`att_proj`), a tied head left out or not."""
    names = list(names)
    grouped = any("transformer.block_groups." in name for name in names)
    return {
        "block_group_size": (config.get("block_group_size") or 1) if grouped else None,
        "fused": any(name.endswith(".att_proj.weight") for name in names),
        **copied_head(names, bool(config.get("weight_tying")), "transformer.ff_out.weight"),
    }


def llada_vocabulary(config: Config) -> Vocabulary:
    """Text ids only, with [MASK] inside the range."""
    KEYS.check(config)
    size = _rows(config)
    known = {"eot": EOT_8B} if size == ROWS_8B else {}
    return text_vocabulary(size, known | special_ids(config, "mask", "eos", "pad", "eot"), "126336 in the 8B models")


def llada_settings(config: Config) -> dict[str, Any]:
    """`MaskedTransformer` arguments for an upstream configuration; `ConfigError` for an option that is not built."""
    taken = KEYS.read(config)
    if config.get("include_qkv_bias") and not taken["linear_bias"]:
        raise ConfigError("config has include_qkv_bias without include_bias; only both or neither are supported")
    kv_heads = config.get("n_kv_heads")
    if kv_heads is None:
        kv_heads = 1 if config.get("multi_query_attention") else taken["num_heads"]
    ffn_size = config.get("mlp_hidden_size")
    return {
        **taken,
        "vocab_size": _rows(config),
        "num_kv_heads": kv_heads,
        "ffn_size": int(config.get("mlp_ratio", MLP_RATIO) * taken["hidden_size"]) if ffn_size is None else ffn_size,
        **llama_settings(config, 1e4),
        "qk_norm": "width" if config.get("attention_layer_norm") else "none",
        "head_bias": taken["linear_bias"] and not taken["tie_head"],
    }


NAMES = {
    "embed_tokens": "transformer.wte",
    "blocks.{i}.attention_norm": "transformer.blocks.{i}.attn_norm",
    "blocks.{i}.attention.qkv": "transformer.blocks.{i}.{q,k,v}_proj",
    "blocks.{i}.attention.out": "transformer.blocks.{i}.attn_out",
    "blocks.{i}.feed_forward.up": "transformer.blocks.{i}.{ff,up}_proj",
    "blocks.{i}.feed_forward.down": "transformer.blocks.{i}.ff_out",
    "blocks.{i}.attention.q_norm": "transformer.blocks.{i}.q_norm",
    "blocks.{i}.attention.k_norm": "transformer.blocks.{i}.k_norm",
    "blocks.{i}.ffn_norm": "transformer.blocks.{i}.ff_norm",
    "final_norm": "transformer.ln_f",
    "output_weight": "transformer.ff_out.weight",
    "output_bias": "transformer.ff_out.bias",
}


def llada_keymap(model: MaskedTransformer, spelling: Spelling) -> KeyMap:
    """Names of a network with `llada_settings`."""
    names, qkv, group = NAMES, "blocks.{i}.attention.qkv", spelling.get("block_group_size")
    if spelling.get("fused"):
        names = {**names, qkv: "transformer.blocks.{i}.att_proj"}
    if group is not None:
        names = {ours: theirs.replace(".blocks.", ".block_groups.") for ours, theirs in names.items()}

    def layer(i: int) -> str:
        return str(i) if group is None else f"{i // group}.{i % group}"

    copies = {"transformer.ff_out.weight": "transformer.wte.weight"} if model.config["tie_head"] else {}
    return KeyMap.of(model, names, copies=copies, rows={qkv: qkv_rows(model.config)}, layer=layer)


# of every family whose weights have LLaDA's names
LLADA_NAMES: dict[str, Any] = {
    "keys": (r"transformer\.wte\.weight$", r"transformer\.(blocks\.0|block_groups\.0\.0)\.ff_proj\.weight$"),
    "keymap": llada_keymap,
    "spelling": llada_spelling,
    "prefix": "model.",
    "chosen_vocabulary": True,
}


def _rows(config: Config) -> int:
    rows = config.get("embedding_size") or config.get("vocab_size")
    if rows is None:
        raise ConfigError("its config has no 'vocab_size', which llada needs")
    return rows


CONFIG: dict[str, Any] = {
    **dict(d_model=4096, n_layers=32, n_heads=32, n_kv_heads=32, mlp_hidden_size=12288, max_sequence_length=4096),
    **dict(vocab_size=ROWS_8B, embedding_size=ROWS_8B, mask_token_id=126336, eos_token_id=126081, pad_token_id=126081),
    **dict(activation_type="silu", block_type="llama", layer_norm_type="rms", rms_norm_eps=1e-5),
    **dict(rope=True, rope_theta=500000.0, weight_tying=False, include_bias=False, include_qkv_bias=False),
}
EIGHT_BILLION = (8_000_000_000, 5e-2)  # the number that the models' names state
RELEASES = tuple(Release(name, CONFIG, *EIGHT_BILLION) for name in ("llada-8b-base", "llada-8b-instruct", "llada-1.5"))
TINY_CONFIG: dict[str, Any] = {
    **dict(d_model=16, n_heads=2, n_kv_heads=2, n_layers=2, mlp_hidden_size=24, vocab_size=40, embedding_size=40),
    **dict(mask_token_id=30, eos_token_id=29, rope_theta=5e5),
}

LLADA = Family(
    name="llada",
    fits=lambda config: "d_model" in config and "n_layers" in config,
    priority=-1,  # others have these settings and more
    settings=llada_settings,
    vocabulary=llada_vocabulary,
    vocabularies={"llada": llada_vocabulary(RELEASES[0].config)},
    releases=RELEASES,
    tiny=Tiny({"model_type": "llada", **TINY_CONFIG}, (0.00893976, 0.593655, 0.795968, -0.763248)),
    **LLADA_NAMES,
    layout=chat_layout(LLADA_CHAT, "llada"),
)
