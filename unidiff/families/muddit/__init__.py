"""Muddit (arXiv 2505.23606) and Meissonic (arXiv 2410.08261): their MM-DiT checkpoints, names, ids and conventions.

Conventions of the family: text and image ids have separate tables and heads; the text encoder is CLIP (its features
before the last layer, and its projected pooled vector); pixels of the `VQModel` are in [0, 1]; all padded text tokens
are attended to; the time given to the network follows one of `TIME_CONVENTIONS`, per checkpoint.
"""

from __future__ import annotations

from typing import Any

from unidiff.families.checkpoint.config_keys import Argument, ConfigError, ConfigKeys
from unidiff.families.checkpoint.keymap import LAYER, Entry, KeyMap, joined, linear, per_layer
from unidiff.families.family import Config, Family, Release, Spelling, Tiny, config_names
from unidiff.families.muddit.rows import MeissonicLayout, MudditLayout
from unidiff.models.mmdit import MMDiT
from unidiff.schema import Depth, Index, Layers, Rows, Width
from unidiff.tokens import Vocabulary

CLASSES = {"SymmetricTransformer2DModel": "muddit", "Transformer2DModel": "meissonic"}
CLIP_SIZE = 49408  # ids of the CLIP tokenizer; <|startoftext|> and <|endoftext|> are the last two
KEYS = ConfigKeys(
    "Muddit",
    used={
        "vocab_size": Argument("vocab_size", Rows, 8256),
        "codebook_size": Argument("codebook_size", Rows, 8192),
        "tokenizer_vocab_size": Argument("text_vocab_size", Rows | None, None),
        "num_layers": Argument("num_layers", Layers, 19),
        "num_single_layers": Argument("num_single_layers", Layers, 38),
        "num_attention_heads": Argument("num_heads", Depth, 24),
        "attention_head_dim": Argument("head_dim", Width, 128),
        "joint_attention_dim": Argument("text_dim", Width, 4096),
        "pooled_projection_dim": Argument("pooled_dim", Width, 768),
        "axes_dims_rope": Argument("rope_axes", list[Index] | tuple[Index, ...], (16, 56, 56)),
        "t5_dim": Argument("adapter_dim", Width | None, None),
        "downsample": Argument("downsample", bool, False),
        "upsample": bool,
    },
    fixed={"guidance_embeds": (False, None), "patch_size": (1, None)},
    harmless=("in_channels",),  # of the network that this one was made from; codes have a table
    closed=True,
)
# What the published `transformer/config.json` files hold, under upstream's names.
PUBLISHED: dict[str, dict[str, Any]] = {
    "muddit": {
        "vocab_size": 8256,
        "codebook_size": 8192,
        "tokenizer_vocab_size": 49408,
        "t5_dim": None,
        "num_layers": 14,
        "num_single_layers": 28,
        "num_attention_heads": 8,
        "attention_head_dim": 128,
        "joint_attention_dim": 1024,
        "pooled_projection_dim": 1024,
        "axes_dims_rope": [16, 56, 56],
        "downsample": True,
        "upsample": True,
    }
}
PUBLISHED["meissonic"] = {k: v for k, v in PUBLISHED["muddit"].items() if k not in {"tokenizer_vocab_size", "t5_dim"}}


def muddit_settings(config: Config) -> dict[str, Any]:
    """`MMDiT` arguments for an upstream configuration; a missing key takes upstream's default.

    Raises:
        ValueError: an unknown key, or an option that no released model uses.
    """
    taken = KEYS.read(config)
    name = config.get("_class_name")
    if name is not None and name not in CLASSES:
        raise ConfigError(f"the config describes a {name}; expected one of {sorted(CLASSES)}")
    if config.get("downsample", False) != config.get("upsample", False):
        raise ConfigError("downsample and upsample differ, so logits would not fit the codes; set both or neither")
    return taken


def muddit_vocabulary(config: Config) -> Vocabulary:
    """The two separate tables as one id space: text ids, text [MASK], then the image table with its [MASK] last.

    A checkpoint without a text head (Meissonic) reads CLIP ids all the same.
    """
    KEYS.check(config)
    text = config.get("tokenizer_vocab_size") or CLIP_SIZE
    rows, codes = config.get("vocab_size", 8256), config.get("codebook_size", 8192)
    start = text + 1
    specials = {"bos": text - 2, "eos": text - 1}
    return Vocabulary(start + rows, (0, text), (start, start + codes), text, start + rows - 1, specials)


def muddit_keymap(model: MMDiT, spelling: Spelling) -> KeyMap:
    """Names of a network with `muddit_settings`."""
    config = model.config
    time, words = "time_text_embed.timestep_embedder", "time_text_embed.text_embedder"
    entries = [
        *(_plain("adapter", "adapter.1") if config["adapter_dim"] is not None else ()),
        *_plain("embed_codes", "embed.embeddings"),
        *_plain("embed_norm", "embed.layer_norm"),
        *_plain("embed_out", "embed.conv"),
        *linear("condition_time.first", f"{time}.linear_1"),
        *linear("condition_time.second", f"{time}.linear_2"),
        *linear("condition_pooled.first", f"{words}.linear_1"),
        *linear("condition_pooled.second", f"{words}.linear_2"),
        *_plain("embed_pooled.first", "cond_embed.linear_1"),
        *_plain("embed_pooled.second", "cond_embed.linear_2"),
        *linear("embed_text", "context_embedder"),
        *_plain("text_norm", "encoder_proj_layer_norm"),
        *_plain("enter_norm", "project_to_hidden_norm"),
        *_plain("enter", "project_to_hidden"),
        *per_layer(config["num_layers"], _double_block(config)),
        *per_layer(config["num_single_layers"], _single_block(config)),
        *(_plain("text_out", "text_decoder.1") if config["text_vocab_size"] is not None else ()),
        *_plain("leave_norm", "project_from_hidden_norm"),
        *_plain("leave", "project_from_hidden"),
        *_plain("image_in", "mlm_layer.conv1"),
        *_plain("image_norm", "mlm_layer.layer_norm"),
        *_plain("image_out", "mlm_layer.conv2"),
    ]
    if config["downsample"]:
        for ours, theirs in (("down", "down_block.downsample"), ("up", "up_block.upsample")):
            entries += [*_plain(f"{ours}_norm", f"{theirs}.norm"), *_plain(ours, f"{theirs}.conv")]
    return KeyMap(entries)


def _plain(ours: str, theirs: str) -> list[Entry]:
    """A layer without a bias."""
    return linear(ours, theirs, bias=False)


def _double_block(config: Config) -> list[Entry]:
    entries = []
    names = {  # stream: adaLN, q k v, norms of q and k, output, feed-forward
        "text": ("norm1_context", "add_{}_proj", "norm_added_{}", "to_add_out", "ff_context"),
        "image": ("norm1", "to_{}", "norm_{}", "to_out.0", "ff"),
    }
    for stream, (norm, projection, head_norm, out, feed_forward) in names.items():
        ours, theirs = f"double_blocks.{LAYER}.{stream}", f"transformer_blocks.{LAYER}"
        entries += [
            *linear(f"{ours}.ada_ln.linear", f"{theirs}.{norm}.linear"),
            *_heads(f"{ours}.heads", f"{theirs}.attn.{projection}", f"{theirs}.attn.{head_norm}", config),
            *linear(f"{ours}.out", f"{theirs}.attn.{out}"),
            *linear(f"{ours}.feed_forward.up", f"{theirs}.{feed_forward}.net.0.proj"),
            *linear(f"{ours}.feed_forward.down", f"{theirs}.{feed_forward}.net.2"),
        ]
    return entries


def _single_block(config: Config) -> list[Entry]:
    ours, theirs = f"single_blocks.{LAYER}", f"single_transformer_blocks.{LAYER}"
    return [
        *linear(f"{ours}.ada_ln.linear", f"{theirs}.norm.linear"),
        *_heads(f"{ours}.heads", f"{theirs}.attn.to_{{}}", f"{theirs}.attn.norm_{{}}", config),
        *linear(f"{ours}.up", f"{theirs}.proj_mlp"),
        *linear(f"{ours}.out", f"{theirs}.proj_out"),
    ]


def _heads(ours: str, projection: str, norm: str, config: Config) -> list[Entry]:
    """Packed projections and their norms; `{}` in the names stands for q, k and v."""
    size = config["num_heads"] * config["head_dim"]
    return [
        *joined(f"{ours}.qkv", [projection.replace("{}", x) for x in "qkv"], (size,) * 3, bias=True),
        *(entry for x in "qk" for entry in _plain(f"{ours}.{x}_norm", norm.replace("{}", x))),
    ]


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
