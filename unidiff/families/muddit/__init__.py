"""Muddit (arXiv 2505.23606) and Meissonic (arXiv 2410.08261): their MM-DiT checkpoints, names, ids and conventions.

Conventions of the family: text and image ids have separate tables and heads; the text encoder is CLIP (its features
before the last layer, and its projected pooled vector); pixels of the `VQModel` are in [0, 1]; all padded text tokens
are attended to; the time given to the network follows one of `TIME_CONVENTIONS`, per checkpoint.
"""

from __future__ import annotations

from typing import Any

from unidiff.families.checkpoint.config_keys import Argument, ConfigError, ConfigKeys
from unidiff.families.checkpoint.keymap import KeyMap
from unidiff.families.family import Config, Family, Release, Tiny, config_names
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
_MEISSONIC: dict[str, Any] = {
    **dict(vocab_size=8256, codebook_size=8192, num_layers=14, num_single_layers=28, num_attention_heads=8),
    **dict(attention_head_dim=128, joint_attention_dim=1024, pooled_projection_dim=1024, axes_dims_rope=[16, 56, 56]),
    **dict(downsample=True, upsample=True),
}
PUBLISHED = {"muddit": {**_MEISSONIC, "tokenizer_vocab_size": 49408, "t5_dim": None}, "meissonic": _MEISSONIC}


def muddit_settings(config: Config) -> dict[str, Any]:
    """`MMDiT` arguments for an upstream configuration; a missing key takes upstream's default."""
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


NAMES = {
    "adapter": "adapter.1",
    "embed_codes": "embed.embeddings",
    "embed_norm": "embed.layer_norm",
    "embed_out": "embed.conv",
    "condition_time.first": "time_text_embed.timestep_embedder.linear_1",
    "condition_time.second": "time_text_embed.timestep_embedder.linear_2",
    "condition_pooled.first": "time_text_embed.text_embedder.linear_1",
    "condition_pooled.second": "time_text_embed.text_embedder.linear_2",
    "embed_pooled.first": "cond_embed.linear_1",
    "embed_pooled.second": "cond_embed.linear_2",
    "embed_text": "context_embedder",
    "text_norm": "encoder_proj_layer_norm",
    "enter_norm": "project_to_hidden_norm",
    "enter": "project_to_hidden",
    "double_blocks.{i}.text.ada_ln.linear": "transformer_blocks.{i}.norm1_context.linear",
    "double_blocks.{i}.text.heads.qkv": "transformer_blocks.{i}.attn.add_{q,k,v}_proj",
    "double_blocks.{i}.text.heads.q_norm": "transformer_blocks.{i}.attn.norm_added_q",
    "double_blocks.{i}.text.heads.k_norm": "transformer_blocks.{i}.attn.norm_added_k",
    "double_blocks.{i}.text.out": "transformer_blocks.{i}.attn.to_add_out",
    "double_blocks.{i}.text.feed_forward.up": "transformer_blocks.{i}.ff_context.net.0.proj",
    "double_blocks.{i}.text.feed_forward.down": "transformer_blocks.{i}.ff_context.net.2",
    "double_blocks.{i}.image.ada_ln.linear": "transformer_blocks.{i}.norm1.linear",
    "double_blocks.{i}.image.heads.qkv": "transformer_blocks.{i}.attn.to_{q,k,v}",
    "double_blocks.{i}.image.heads.q_norm": "transformer_blocks.{i}.attn.norm_q",
    "double_blocks.{i}.image.heads.k_norm": "transformer_blocks.{i}.attn.norm_k",
    "double_blocks.{i}.image.out": "transformer_blocks.{i}.attn.to_out.0",
    "double_blocks.{i}.image.feed_forward.up": "transformer_blocks.{i}.ff.net.0.proj",
    "double_blocks.{i}.image.feed_forward.down": "transformer_blocks.{i}.ff.net.2",
    "single_blocks.{i}.ada_ln.linear": "single_transformer_blocks.{i}.norm.linear",
    "single_blocks.{i}.heads.qkv": "single_transformer_blocks.{i}.attn.to_{q,k,v}",
    "single_blocks.{i}.heads.q_norm": "single_transformer_blocks.{i}.attn.norm_q",
    "single_blocks.{i}.heads.k_norm": "single_transformer_blocks.{i}.attn.norm_k",
    "single_blocks.{i}.up": "single_transformer_blocks.{i}.proj_mlp",
    "single_blocks.{i}.out": "single_transformer_blocks.{i}.proj_out",
    "text_out": "text_decoder.1",
    "leave_norm": "project_from_hidden_norm",
    "leave": "project_from_hidden",
    "image_in": "mlm_layer.conv1",
    "image_norm": "mlm_layer.layer_norm",
    "image_out": "mlm_layer.conv2",
    "down_norm": "down_block.downsample.norm",
    "down": "down_block.downsample.conv",
    "up_norm": "up_block.upsample.norm",
    "up": "up_block.upsample.conv",
}
_KEYS = (r"^transformer_blocks\.0\.attn\.add_q_proj\.weight$", r"^mlm_layer\.conv1\.weight$")
_TINY: dict[str, Any] = {
    **dict(vocab_size=20, codebook_size=16, num_layers=1, num_single_layers=1, num_attention_heads=2),
    **dict(attention_head_dim=12, joint_attention_dim=16, pooled_projection_dim=12, axes_dims_rope=[4, 4, 4]),
}
_CLASS, _OTHER = {"_class_name": "SymmetricTransformer2DModel"}, {"_class_name": "Transformer2DModel"}
_BOTH: dict[str, Any] = {
    "settings": muddit_settings,
    "keymap": lambda model, spelling: KeyMap.of(model, NAMES),
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
