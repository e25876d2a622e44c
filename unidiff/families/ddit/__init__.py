"""D-DiT (dual diffusion, arXiv 2501.00289): checkpoint names, ids and settings of the MM-DiT that grew out of SD3.

Conventions of the family: ids are those of T5's table, of which the head predicts the first `vocab_size` and the last of these
is [MASK]; T5 reads the noisy ids themselves; pictures are latents of an `AutoencoderKL`, whose pixels are in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unidiff.families.checkpoint.config_keys import Argument, ConfigError, ConfigKeys
from unidiff.families.checkpoint.keymap import KeyMap
from unidiff.families.ddit.rows import DualLayout, DualTexts
from unidiff.families.family import Config, Family, Release, Tiny, config_names
from unidiff.models.dual_mmdit import DualMMDiT
from unidiff.schema import Depth, Index, Layers, Rows, Width
from unidiff.tokens import Vocabulary
from unidiff.tokens.image.latents import AutoencoderLatents, CodeLatents, PictureLatents
from unidiff.tokens.image.vq import VQImageTokenizer
from unidiff.weights.files import open_checkpoint, weight_file

CLASS = "SD3JointModelFlexible"
END = 1  # </s> of T5, which texts are filled up with
KEYS = ConfigKeys(
    "D-DiT",
    used={
        "vocab_size": Argument("vocab_size", Rows, 32128),
        "sample_size": Argument("sample_size", Width, 128),
        "patch_size": Argument("patch_size", Width, 2),
        "in_channels": Argument("in_channels", Width, 16),
        "num_layers": Argument("num_layers", Layers, 18),
        "num_attention_heads": Argument("num_heads", Depth, 18),
        "attention_head_dim": Argument("head_dim", Width, 64),
        "joint_attention_dim": Argument("text_dim", Width, 4096),
        "eos_token_id": Index | None,  # of models of one's own; T5's where it is not said
        "out_channels": Argument("out_channels", Width, 16),
        "pos_embed_max_size": Argument("position_side", Width, 96),
        "caption_projection_dim": Width | None,
    },
    fixed={"qk_norm": (None,), "dual_attention_layers": ((), [], None)},
    harmless=("pooled_projection_dim",),  # of SD3, from which the network was made
    closed=True,
)
PUBLISHED: dict[str, Any] = {
    **dict(vocab_size=32100, sample_size=64, patch_size=2, in_channels=16, num_layers=24, num_attention_heads=24),
    **dict(attention_head_dim=64, joint_attention_dim=4096, caption_projection_dim=1536, pooled_projection_dim=2048),
    **dict(out_channels=16, pos_embed_max_size=192),
}
"""SD3-medium's sizes, as far as D-DiT's weights and papers state them."""


def ddit_settings(config: Config) -> dict[str, Any]:
    """`DualMMDiT` arguments for an upstream configuration; a missing key takes upstream's default."""
    taken = KEYS.read(config)
    width = taken["num_heads"] * taken["head_dim"]
    if config.get("caption_projection_dim") not in (None, width):
        raise ConfigError(
            f"caption_projection_dim is {config['caption_projection_dim']}, but the attention heads are {width} wide; "
            "they have to agree"
        )
    return taken


def ddit_vocabulary(config: Config) -> Vocabulary:
    """T5's ids that the head knows; the last one is [MASK]. Pictures have none."""
    KEYS.check(config)
    size = config.get("vocab_size") or 32128
    return Vocabulary(size, (0, size), (size, size), size - 1, specials={"eos": config.get("eos_token_id", END)})


NAMES = {
    "null_image": "null_image_embd",
    "positions": "pos_embed.pos_embed",
    "patch": "pos_embed.proj",
    "condition_time.first": "time_text_embed.timestep_embedder.linear_1",
    "condition_time.second": "time_text_embed.timestep_embedder.linear_2",
    "embed_text": "context_embedder",
    "double_blocks.{i}.image.ada_ln.linear": "transformer_blocks.{i}.norm1.linear",
    "double_blocks.{i}.text.ada_ln.linear": "transformer_blocks.{i}.norm1_context.linear",
    "double_blocks.{i}.image.heads.qkv": "transformer_blocks.{i}.attn.to_{q,k,v}",
    "double_blocks.{i}.text.heads.qkv": "transformer_blocks.{i}.attn.add_{q,k,v}_proj",
    "double_blocks.{i}.image.out": "transformer_blocks.{i}.attn.to_out.0",
    "double_blocks.{i}.text.out": "transformer_blocks.{i}.attn.to_add_out",
    "double_blocks.{i}.image.feed_forward.up": "transformer_blocks.{i}.ff.net.0.proj",
    "double_blocks.{i}.image.feed_forward.down": "transformer_blocks.{i}.ff.net.2",
    "double_blocks.{i}.text.feed_forward.up": "transformer_blocks.{i}.ff_context.net.0.proj",
    "double_blocks.{i}.text.feed_forward.down": "transformer_blocks.{i}.ff_context.net.2",
    "image_norm": "image_norm_out.linear",
    "image_out": "image_proj_out",
    "text_out": "text_proj_out",
}
_TINY: dict[str, Any] = {
    **dict(_class_name=CLASS, vocab_size=40, sample_size=8, patch_size=2, in_channels=4, num_layers=2),
    **dict(num_attention_heads=2, attention_head_dim=8, joint_attention_dim=12, out_channels=4, pos_embed_max_size=6),
}


def picture_latents(folder: Path, model: DualMMDiT) -> PictureLatents:
    """Of a D-DiT folder: its `vae`, or where `dual.json` gives the scale of code vectors, its `image_tokenizer`.

    Raises:
        FileNotFoundError: neither is there. ValueError: weights that do not fit.
    """
    own = DualTexts.of(folder)
    if own.scale is not None:
        return CodeLatents(VQImageTokenizer.from_pretrained(folder / "image_tokenizer"), own.scale)
    place = folder / "vae" if (folder / "vae").is_dir() else folder
    if not (place / "config.json").is_file():
        raise FileNotFoundError(f"{folder} has no vae; put the AutoencoderKL folder of the release there")
    return AutoencoderLatents.from_folder(place, model.config.patch_size)


def examine(folder: Path, vocabulary: Vocabulary) -> Mapping[str, tuple[bool, str]]:
    """Of the T5 beside a network's folder: whether its table has a row for [MASK], and how long that is.

    The release puts a vector of its own into that row, which in plain T5 is that of <extra_id_0>.
    """
    place, mask, what = folder.parent / "text_encoder", vocabulary.mask_id, "row of [MASK] in T5"
    if not place.is_dir():
        return {}
    stored = open_checkpoint(weight_file(place, any_name=True))
    tables = [value for name, value in stored.items() if name.endswith(("shared.weight", "embed_tokens.weight"))]
    if not tables or tables[0].shape[0] <= mask:
        return {what: (False, f"{place} has no table with a row {mask}")}
    norms = tables[0].read().float().norm(dim=1)
    share = float(norms[mask] / norms.median())
    return {what: (share > 0, f"{share:.3g} times as long as the median row")}


def _fits(config: Config) -> bool:
    """By the class, or without one by the settings that only this network has together."""
    if "_class_name" in config:
        return config_names(config, CLASS)
    return {"pos_embed_max_size", "joint_attention_dim", "vocab_size"} <= set(config)


DDIT = Family(
    name="ddit",
    keys=(r"^null_image_embd$", r"^text_proj_out\.weight$", r"^transformer_blocks\.0\.attn\.add_q_proj\.weight$"),
    fits=_fits,
    settings=ddit_settings,
    keymap=lambda model, spelling: KeyMap.of(model, NAMES),
    network=DualMMDiT,
    vocabulary=ddit_vocabulary,
    vocabularies={"ddit": ddit_vocabulary(PUBLISHED)},
    layout=DualLayout.of,
    examine=examine,
    latents=picture_latents,
    releases=(Release("ddit", {"_class_name": CLASS, **PUBLISHED}),),
    unstated=("sample_size", "position_side"),
    tiny=Tiny(_TINY, (0.875147, 2.178904, -1.724368, 3.608911)),
)
