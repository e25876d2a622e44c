"""Released image tokenizers: LlamaGen's, MAGVIT-v2 and diffusers' `VQModel`.

Upstream images of the first two are in [-1, 1]; here all are in [0, 1] and the models convert them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any

import torch
from diffusers import VQModel

from unidiff.families.checkpoint.config_keys import Argument, ConfigError, ConfigKeys
from unidiff.families.checkpoint.keymap import KeyMap
from unidiff.families.family import Config, Family, Release, Spelling, Tiny, config_names
from unidiff.schema import Between, Depth, Rows, Width
from unidiff.tokens.image.conv import ConvVQModel, LFQModel, bit_values, lfq_vectors
from unidiff.tokens.image.diffusers_vq import DiffusersVQ


def rename_with(*rules: tuple[str, str | Callable[[re.Match[str]], str]]) -> Callable[[str], str]:
    """A renaming by regular expressions, applied in order after those that all families share."""
    shared = ((r"\.shortcut\.", ".nin_shortcut."), (r"\.out\.", ".proj_out."))

    def rename(name: str) -> str:
        for pattern, value in (*shared, *rules):
            name = re.sub(pattern, value, name)
        return name

    return rename


_COMMON: dict[str, Any] = dict(
    ch=128, num_res_blocks=2, z_channels=256, codebook_size=16384, codebook_embed_dim=8, codebook_l2_norm=True
)
LLAMAGEN_RELEASED: dict[str, dict[str, Any]] = {
    name: {**_COMMON, "encoder_ch_mult": levels, "decoder_ch_mult": levels}
    for name, levels in (("VQ-16", (1, 1, 2, 2, 4)), ("VQ-8", (1, 2, 2, 4)))
}
_LEVELS = list[Depth] | tuple[Depth, ...]
LLAMAGEN_KEYS = ConfigKeys(
    "LlamaGen tokenizer",
    used={
        "ch": Argument("encoder_channels", Width),
        "num_res_blocks": Annotated[int, Between(1, 128)],
        "z_channels": Argument("z_channels", Width),
        "codebook_size": Argument("codebook_size", Rows),
        "codebook_embed_dim": Argument("code_dim", Width),
        "codebook_l2_norm": Argument("l2_norm", bool),
        **dict.fromkeys(("encoder_ch_mult", "decoder_ch_mult"), _LEVELS),
    },
    harmless=("commit_loss_beta", "entropy_loss_ratio", "dropout_p", "codebook_show_usage"),  # of training
    closed=True,
)

_llamagen_name = rename_with(
    (r"^encoder\.levels\.(\d+)\.resample\.", r"encoder.conv_blocks.\1.downsample.conv."),
    (r"^decoder\.levels\.(\d+)\.resample\.", r"decoder.conv_blocks.\1.upsample.conv."),
    (r"\.levels\.(\d+)\.blocks\.", r".conv_blocks.\1.res."),
    (r"\.levels\.(\d+)\.attentions\.", r".conv_blocks.\1.attn."),
    (r"\.middle\.block_1\.", ".mid.0."),
    (r"\.middle\.attention\.", ".mid.1."),
    (r"\.middle\.block_2\.", ".mid.2."),
    (r"^codebook$", "quantize.embedding.weight"),
    (r"^codebook_used$", "quantize.codebook_used"),
)


def llamagen_settings(config: Config) -> dict[str, Any]:
    """`ConvVQModel` arguments for upstream's fields, of which those left out are VQ-16's."""
    full = {**LLAMAGEN_RELEASED["VQ-16"], **config}
    taken = LLAMAGEN_KEYS.read(full)
    encoder, decoder, depth = tuple(full["encoder_ch_mult"]), tuple(full["decoder_ch_mult"]), full["num_res_blocks"]
    return {
        **taken,
        "encoder_multipliers": encoder,
        "encoder_depths": (depth,) * len(encoder),
        "decoder_channels": taken["encoder_channels"],
        "decoder_multipliers": decoder,
        "decoder_depths": (depth + 1,) * len(decoder),  # upstream builds one more on the way up
        "level_attention": True,
    }


def _released(names: Iterable[str]) -> Config:
    """Of the two released models the one with as many levels."""
    last = len(LLAMAGEN_RELEASED["VQ-8"]["encoder_ch_mult"])
    deep = any(name.startswith(f"encoder.conv_blocks.{last}.") for name in names)
    return LLAMAGEN_RELEASED["VQ-16" if deep else "VQ-8"]


_LLAMAGEN_TINY: dict[str, Any] = {
    **dict(ch=32, num_res_blocks=1, z_channels=8, codebook_size=12, codebook_embed_dim=4),
    **dict(encoder_ch_mult=[1, 1], decoder_ch_mult=[1, 1]),
}
LLAMAGEN = Family(
    name="llamagen",
    keys=(r"^encoder\.conv_blocks\.0\.res\.0\.", r"^quantize\.embedding\.weight$"),
    fits=lambda config: bool(config) and set(config) <= {*LLAMAGEN_KEYS.used, *LLAMAGEN_KEYS.harmless},
    settings=llamagen_settings,
    keymap=lambda model, spelling: KeyMap.of(model, _llamagen_name),
    network=ConvVQModel,
    measured={"usage_window": "quantize.codebook_used"},
    default_config=_released,
    releases=tuple(Release(f"llamagen-{name.lower()}", config) for name, config in LLAMAGEN_RELEASED.items()),
    tiny=Tiny(_LLAMAGEN_TINY, (0.67793, 0.442287, 0.0, 1.0), measured={"usage_window": 8}),
)


MAGVIT_RELEASED: dict[str, Any] = {
    "codebook_dim": 13,
    "encoder": {"ch": 128, "ch_mult": (1, 2, 2, 4, 4), "num_res_blocks": (4, 3, 4, 3, 4), "z_channels": 13},
    "decoder": {"ch": 128, "ch_mult": (1, 1, 2, 2, 4), "num_res_blocks": (4, 4, 3, 4, 3), "z_channels": 13},
}
MAGVIT_KEYS = ConfigKeys(
    "MAGVIT-v2",
    used={"codebook_dim": Annotated[int, Between(1, 20)], "encoder": Mapping[str, Any], "decoder": Mapping[str, Any]},
    needed=("codebook_dim", "encoder", "decoder"),
    closed=True,
)


def magvit_settings(config: Config) -> dict[str, Any]:
    """`LFQModel` arguments for an upstream configuration; `ValueError` for an unknown key or another network."""
    MAGVIT_KEYS.check(config)
    settings: dict[str, Any] = {"code_dim": config["codebook_dim"]}
    for name in ("encoder", "decoder"):
        side = ConfigKeys(
            f"MAGVIT-v2 {name}",
            used={
                "ch": Argument(f"{name}_channels", Width),
                "ch_mult": Argument(f"{name}_multipliers", _LEVELS),
                "num_res_blocks": Argument(f"{name}_depths", _LEVELS),
                "z_channels": Argument("z_channels", Width),
            },
            fixed={"in_ch": (3,), "out_ch": (3,), "double_z": (False, None)},
            harmless=(
                "attn_resolutions",
                "resolution",
                "dropout",
            ),  # attention is in the middle only: [5] never matches
            closed=True,
        )
        settings |= side.read(config[name])
    if config["encoder"]["z_channels"] != config["decoder"]["z_channels"]:
        raise ConfigError("MAGVIT-v2 encoder and decoder name different z_channels; they meet in the same latent")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}


def _magvit_keymap(model: LFQModel, spelling: Spelling) -> KeyMap:
    """With the two buffers that the width of a code determines."""
    width, last = model.config.code_dim, len(model.config.decoder_multipliers) - 1
    vectors = lfq_vectors(torch.arange(2**width), width)
    constants = {"quantize.embedding": vectors, "quantize.power_vals": bit_values(width)}
    rename = rename_with(
        (r"^encoder\.levels\.(\d+)\.resample\.", r"encoder.down.\1.downsample.conv."),
        (r"^encoder\.levels\.(\d+)\.blocks\.", r"encoder.down.\1.block."),
        # upstream counts decoder levels from the highest resolution
        (r"^decoder\.levels\.(\d+)\.resample\.", lambda m: f"decoder.up.{last - int(m[1])}.upsample.conv."),
        (r"^decoder\.levels\.(\d+)\.blocks\.", lambda m: f"decoder.up.{last - int(m[1])}.block."),
        (r"\.middle\.attention\.", ".mid.attn_1."),
        (r"\.middle\.", ".mid."),
        (r"^quant_conv\.", "encoder.quant_conv."),
        (r"^post_quant_conv\.", "decoder.post_quant_conv."),
    )
    return KeyMap.of(model, rename, constants)


_MAGVIT_TINY = {"ch": 32, "ch_mult": [1, 1], "num_res_blocks": [1, 1], "z_channels": 4}
MAGVIT = Family(
    name="magvit",
    keys=(r"^encoder\.down\.0\.block\.0\.", r"^decoder\.up\.0\.block\.0\."),
    fits=lambda config: "codebook_dim" in config and "encoder" in config,
    settings=magvit_settings,
    keymap=_magvit_keymap,
    network=LFQModel,
    default_config=lambda names: MAGVIT_RELEASED,
    releases=(Release("magvitv2", MAGVIT_RELEASED),),
    tiny=Tiny({"codebook_dim": 4, "encoder": _MAGVIT_TINY, "decoder": _MAGVIT_TINY}, (0.765536, 0.351238, 0.0, 1.0)),
    constants=("quantize.embedding", "quantize.power_vals"),
)


def vq_model_settings(config: Config) -> dict[str, Any]:
    """`VQModel` arguments of its own config; `ValueError` for an unknown or unusable one."""
    fields = {key: value for key, value in config.items() if not key.startswith("_")}
    DiffusersVQ.check_config(fields)
    return fields


# of Muddit and Meissonic; of Lumina-DiMOO's only factor 16 and 8,192 codes are stated
_VQ_RELEASED = {
    "_class_name": "VQModel",
    "block_out_channels": (128, 256, 256, 512, 768),
    "layers_per_block": 2,
    "latent_channels": 64,
    "num_vq_embeddings": 8192,
    "force_upcast": True,
    "down_block_types": ["DownEncoderBlock2D"] * 5,
    "up_block_types": ["UpDecoderBlock2D"] * 5,
}
_VQ_TINY: dict[str, Any] = {
    "_class_name": "VQModel",
    **dict(block_out_channels=[4, 4], latent_channels=4, num_vq_embeddings=16, norm_num_groups=2),
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "lookup_from_codebook": True,
}
VQ_MODEL = Family(
    name="vq_model",
    keys=(r"^encoder\.down_blocks\.0\.resnets\.0\.", r"^quantize\.embedding\.weight$"),
    fits=lambda config: config_names(config, "VQModel") or "num_vq_embeddings" in config,
    settings=vq_model_settings,
    keymap=lambda model, spelling: KeyMap.of(model),
    network=VQModel,
    releases=(Release("muddit-vq", _VQ_RELEASED),),
    unstated=("down_block_types", "up_block_types"),
    tiny=Tiny(_VQ_TINY, (0.693631, 0.446761, 0.261659, 1.0)),
)
