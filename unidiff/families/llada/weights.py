"""LLaDA (Nie et al. 2025, arXiv 2502.09992): checkpoints of its bidirectional Llama network, and what descends from it.

Conventions of the family: pre-norm, RMSNorm, rotary by index in the row, no time, the logit at a position predicts the
token at that position; end-of-text fill is visible and a target. MMaDA and Lumina-DiMOO use the same names and add image
codes to the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any

import torch
from torch import Tensor

from unidiff.families.checkpoint.config_keys import ConfigError, ConfigKeys, plain_rope_theta
from unidiff.families.checkpoint.keymap import Entry, KeyMap, build, strip_prefixes, unwrap
from unidiff.families.family import Spelling, copied_head
from unidiff.models.transformer import MaskedTransformer
from unidiff.schema import Between, Depth, Index, Positive, Rows, Width
from unidiff.tokens.batch import TokenBatch
from unidiff.tokens.vocabulary import Modality, Vocabulary

PREFIXES = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "model.")
EOT_8B = 126348  # end of turn; in no released config
MLP_RATIO = 4  # upstream's default
COPIES = {"transformer.ff_out.weight": "transformer.wte.weight"}  # of a tied head
_DROPPED = "dropout is off when a model is used"
_INIT = "only before training"
_COST = "how fast, not what"
KEYS = ConfigKeys(
    "llada",
    used={
        "d_model": Width,
        "n_heads": Depth,
        "n_kv_heads": Depth | None,
        "multi_query_attention": bool | None,
        "n_layers": Depth,
        "mlp_hidden_size": Width | None,
        "mlp_ratio": Annotated[float, Between(1e-3, 1e3)],
        "vocab_size": Rows,
        "embedding_size": Index | None,
        "rms_norm_eps": Annotated[float, Between(0, 1)],
        "rope_theta": Positive,
        "rope_scaling": Any,  # `plain_rope_theta` looks at these two
        "rope_parameters": Any,
        "attention_layer_norm": bool | None,
        "weight_tying": bool | None,
        "include_bias": bool | None,
        "include_qkv_bias": bool | None,
        "block_group_size": Depth | None,
        "max_sequence_length": Index | None,
        **{f"{name}_token_id": Index | None for name in ("mask", "eos", "pad", "eot", "bos")},
        # of MMaDA
        "new_vocab_size": Rows,
        "num_vq_tokens": Index | None,
    },
    needed=("d_model", "n_heads", "n_layers"),
    fixed={  # first the value that is built
        "activation_type": ("silu",),  # silu(ff_proj) * up_proj, nothing halved
        "block_type": ("llama",),
        "layer_norm_type": ("rms",),
        "layer_norm_with_affine": (True,),
        "attention_layer_norm_with_affine": (True, None),
        "bias_for_layer_norm": (False, None),
        "rope": (True,),
        "alibi": (False, None),
        "input_emb_norm": (False, None),
        "scale_logits": (False, None),
        "clip_qkv": (None,),
    },
    harmless={
        "alibi_bias_max": "without alibi",
        **dict.fromkeys(("attention_dropout", "residual_dropout", "embedding_dropout"), _DROPPED),
        **dict.fromkeys(("init_fn", "init_std", "init_cutoff_factor", "init_device"), _INIT),
        **dict.fromkeys(("flash_attention", "use_cache"), _COST),
        "precision": "of training",
        "rope_full_precision": "positions are always turned in float32 here",
        "tie_word_embeddings": "upstream ties by weight_tying alone",
        "llm_vocab_size": "of the text part, which the id layout says",
        "w_clip_vit": "a second input of training runs; the network is the same",
    },
)


def _spelling(names: Iterable[str], config: Mapping[str, Any]) -> Spelling:
    names = list(names)
    grouped = any("transformer.block_groups." in name for name in names)
    return {
        "block_group_size": (config.get("block_group_size") or 1) if grouped else None,
        "fused": any(name.endswith(".att_proj.weight") for name in names),
        **copied_head(names, bool(config.get("weight_tying")), "transformer.ff_out.weight"),
    }


def _export(model: Any, spelling: Spelling) -> dict[str, Tensor]:
    fused, copies = bool(spelling.get("fused")), bool(spelling.get("copies"))
    return llada_state_dict(model, spelling.get("block_group_size"), fused, copies)


# of every family whose weights have LLaDA's names
LLADA_NAMES: dict[str, Any] = {
    "keys": (r"transformer\.wte\.weight$", r"transformer\.(blocks\.0|block_groups\.0\.0)\.ff_proj\.weight$"),
    "export": _export,
    "spelling": _spelling,
}


def load_llada(
    state_dict: Mapping[str, Any],
    config: Mapping[str, Any],
    dtype: torch.dtype | None = None,
    vocabulary: Vocabulary | None = None,
    device: torch.device | str | None = None,
) -> tuple[MaskedTransformer, Vocabulary]:
    """Model and vocabulary from a released state dict.

    Args:
        state_dict: upstream names; layers as `blocks.N` or `block_groups.G.N`, projections apart or fused (`att_proj`).
        config: a released `config.json`.
        dtype: cast the weights; None keeps the checkpoint's.
        vocabulary: the id layout where the config does not imply it (image codes); of the size that the weights have.
        device: where to load; None for the CPU.

    Raises:
        ValueError: an unsupported option, or weights left over, missing or misshaped.
    """
    kwargs = llada_config(config)
    weights = strip_prefixes(unwrap(state_dict), PREFIXES)
    group = config.get("block_group_size") or 1
    if not any(name.startswith("transformer.block_groups.") for name in weights):
        group = None
    keymap = llada_keymap(kwargs, group, any(name.endswith(".att_proj.weight") for name in weights))
    vocabulary = llada_vocabulary(config) if vocabulary is None else vocabulary
    if vocabulary.size != kwargs["vocab_size"]:
        raise ValueError(f"the vocabulary has {vocabulary.size} ids, but the config has {kwargs['vocab_size']}")
    return build(kwargs, keymap, weights, dtype, device), vocabulary


def llada_state_dict(
    model: MaskedTransformer, block_group_size: int | None = None, fused: bool = False, copies: bool = False
) -> dict[str, Tensor]:
    """The model's weights under released names (`model.transformer.*`), layers grouped and projections fused if asked.

    Args:
        copies: also write a tied head, which is a copy of the embedding.
    """
    theirs = llada_keymap(model.config, block_group_size, fused).to_theirs(model.state_dict(), copies)
    return {f"model.{name}": value for name, value in theirs.items()}


def llada_vocabulary(config: Mapping[str, Any]) -> Vocabulary:
    """Text ids only, with [MASK] inside the range."""
    KEYS.check(config)
    size = _rows(config)
    specials = {n: config[f"{n}_token_id"] for n in ("eos", "pad", "eot") if config.get(f"{n}_token_id") is not None}
    if size == Vocabulary.named("llada").size:
        specials.setdefault("eot", EOT_8B)
    mask_id = config.get("mask_token_id")
    if mask_id is None:
        raise ConfigError("the config has no mask_token_id; expected the id of [MASK] (126336 in the 8B models)")
    return Vocabulary(size, (0, size), (size, size), mask_id, specials=specials)


def llada_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """`MaskedTransformer` arguments for an upstream configuration.

    Raises:
        ValueError: an option that is not built, with its value.
    """
    KEYS.check(config)
    bias = bool(config.get("include_bias", False))
    if bool(config.get("include_qkv_bias", False)) and not bias:
        raise ConfigError("config has include_qkv_bias without include_bias; only both or neither are supported")
    size, heads = config["d_model"], config["n_heads"]
    kv_heads = config.get("n_kv_heads")
    if kv_heads is None:
        kv_heads = 1 if config.get("multi_query_attention") else heads
    ffn_size = config.get("mlp_hidden_size")
    return {
        "vocab_size": _rows(config),
        "hidden_size": size,
        "num_layers": config["n_layers"],
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "ffn_size": int(config.get("mlp_ratio", MLP_RATIO) * size) if ffn_size is None else ffn_size,
        "norm": "rms",
        "norm_eps": config.get("rms_norm_eps", 1e-5),
        "qk_norm": "width" if config.get("attention_layer_norm") else "none",
        "activation": "swiglu",
        "rope": "1d",
        "rope_theta": plain_rope_theta(config, 1e4),
        "modality_embedding": False,
        "tie_head": bool(config.get("weight_tying", False)),
        "head_bias": bias and not config.get("weight_tying", False),
        "linear_bias": bias,
    }


def llada_keymap(config: Mapping[str, Any], block_group_size: int | None = None, fused: bool = False) -> KeyMap:
    """Names for a model made with `llada_config` arguments (its `config` serves too).

    Args:
        block_group_size: layers per `block_groups` entry; None for plain `blocks`.
        fused: queries, keys and values in one `att_proj`.
    """
    entries = [Entry("embed_tokens.weight", "transformer.wte.weight")]
    for layer in range(config["num_layers"]):
        where = f"blocks.{layer}"
        if block_group_size is not None:
            where = f"block_groups.{layer // block_group_size}.{layer % block_group_size}"
        entries += _layer_entries(config, f"blocks.{layer}.", f"transformer.{where}.", fused)
    entries.append(Entry("final_norm.weight", "transformer.ln_f.weight"))
    if not config["tie_head"]:
        entries.append(Entry("output_weight", "transformer.ff_out.weight"))
    if config["head_bias"]:
        entries.append(Entry("output_bias", "transformer.ff_out.bias"))
    return KeyMap(entries, config["num_layers"], PREFIXES, copies=COPIES if config["tie_head"] else {})


def _layer_entries(config: Mapping[str, Any], ours: str, theirs: str, fused: bool) -> list[Entry]:
    size, heads = config["hidden_size"], config["num_heads"]
    kv, inner = size // heads * (config["num_kv_heads"] or heads), config["ffn_size"]
    qk_norm = config["qk_norm"] != "none"
    entries = [Entry(f"{ours}attention_norm.weight", f"{theirs}attn_norm.weight")]
    for part in ("weight", "bias") if config["linear_bias"] else ("weight",):
        qkv = tuple(f"{theirs}{name}_proj.{part}" for name in "qkv")
        entries += [
            Entry(f"{ours}attention.qkv.{part}", f"{theirs}att_proj.{part}")
            if fused
            else Entry(f"{ours}attention.qkv.{part}", qkv, (size, kv, kv)),
            Entry(f"{ours}attention.out.{part}", f"{theirs}attn_out.{part}"),
            Entry(
                f"{ours}feed_forward.up.{part}",
                (f"{theirs}ff_proj.{part}", f"{theirs}up_proj.{part}"),
                (inner, inner),
            ),
            Entry(f"{ours}feed_forward.down.{part}", f"{theirs}ff_out.{part}"),
        ]
    entries += [Entry(f"{ours}attention.{n}_norm.weight", f"{theirs}{n}_norm.weight") for n in "qk" if qk_norm]
    return [*entries, Entry(f"{ours}ffn_norm.weight", f"{theirs}ff_norm.weight")]


def llada_batch(ids: Tensor, given: Tensor | None = None, attended: Tensor | None = None) -> TokenBatch:
    """Text ids `[B, L]` as a `TokenBatch`.

    Args:
        ids: int64, padding on either side.
        given: bool, known tokens; None for all.
        attended: bool or 0/1, False on padding; None where there is none. Positions count from the first attended
            token (rotary is relative, so this equals counting from the start of the row).
    """
    valid = torch.ones_like(ids, dtype=torch.bool) if attended is None else attended.bool()
    positions = torch.zeros(*ids.shape, 3, dtype=torch.long, device=ids.device)
    positions[..., 0] = (valid.long().cumsum(1) - 1).clamp_min(0)
    known = torch.ones_like(valid) if given is None else given | ~valid
    sample = torch.where(valid, 0, -1)
    return TokenBatch(ids, torch.full_like(ids, int(Modality.TEXT)), known, valid, positions, sample)


def _rows(config: Mapping[str, Any]) -> int:
    rows = config.get("embedding_size") or config.get("vocab_size")
    if rows is None:
        raise ConfigError("its config has no 'vocab_size', which llada needs")
    return rows
