"""The MAGVIT-v2 tokenizer of Show-o and MMaDA (`showlab/magvitv2`): names and configuration of its weights.

Factor 16, 13 bits. Upstream images are in [-1, 1], shorter side resized (bicubic) and centre-cropped; here they are in
[0, 1] and the model converts them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import torch

from unidiff.families.checkpoint.config_keys import ConfigError, ConfigKeys
from unidiff.families.checkpoint.keymap import KeyMap
from unidiff.families.family import Config, Family, Release, Spelling, Tiny
from unidiff.families.image_tokenizers.renaming import rename_with
from unidiff.schema import Between, Depth, Width
from unidiff.tokens.image.lfq import LFQModel, bit_values, lfq_vectors

RELEASED: dict[str, Any] = {
    "codebook_dim": 13,
    "encoder": {"ch": 128, "ch_mult": (1, 2, 2, 4, 4), "num_res_blocks": (4, 3, 4, 3, 4), "z_channels": 13},
    "decoder": {"ch": 128, "ch_mult": (1, 1, 2, 2, 4), "num_res_blocks": (4, 4, 3, 4, 3), "z_channels": 13},
}
_LEVELS = list[Depth] | tuple[Depth, ...]
SIDES: dict[str, Any] = dict(
    used={"ch": Width, "ch_mult": _LEVELS, "num_res_blocks": _LEVELS, "z_channels": Width},
    needed=("ch", "ch_mult", "num_res_blocks", "z_channels"),
    fixed={"in_ch": (3,), "out_ch": (3,), "double_z": (False, None)},
    harmless=("attn_resolutions", "resolution", "dropout"),  # attention is in the middle only: [5] never matches
    closed=True,
)
KEYS = ConfigKeys(
    "MAGVIT-v2",
    used={"codebook_dim": Annotated[int, Between(1, 20)], "encoder": Mapping[str, Any], "decoder": Mapping[str, Any]},
    needed=("codebook_dim", "encoder", "decoder"),
    closed=True,
)


def magvit_settings(config: Config) -> dict[str, Any]:
    """`LFQModel` arguments for an upstream configuration.

    Raises:
        ValueError: an unknown key, or an option that is another network.
    """
    KEYS.check(config)
    kwargs: dict[str, Any] = {"code_dim": config["codebook_dim"]}
    for name in ("encoder", "decoder"):
        side = config[name]
        ConfigKeys(f"MAGVIT-v2 {name}", **SIDES).check(side)
        kwargs[f"{name}_channels"] = side["ch"]
        kwargs[f"{name}_multipliers"] = tuple(side["ch_mult"])
        kwargs[f"{name}_depths"] = tuple(side["num_res_blocks"])
    if config["encoder"]["z_channels"] != config["decoder"]["z_channels"]:
        raise ConfigError("MAGVIT-v2 encoder and decoder name different z_channels; they meet in the same latent")
    kwargs["z_channels"] = config["encoder"]["z_channels"]
    return kwargs


def _keymap(model: LFQModel, spelling: Spelling) -> KeyMap:
    """With the two buffers that the width of a code determines."""
    width, last = model.config.code_dim, len(model.config.decoder_multipliers) - 1
    constants = {
        "quantize.embedding": lfq_vectors(torch.arange(2**width), width),
        "quantize.power_vals": bit_values(width),
    }
    rename = rename_with(
        [
            (r"^encoder\.levels\.(\d+)\.resample\.", r"encoder.down.\1.downsample.conv."),
            (r"^encoder\.levels\.(\d+)\.blocks\.", r"encoder.down.\1.block."),
            # upstream counts decoder levels from the highest resolution
            (r"^decoder\.levels\.(\d+)\.resample\.", lambda m: f"decoder.up.{last - int(m[1])}.upsample.conv."),
            (r"^decoder\.levels\.(\d+)\.blocks\.", lambda m: f"decoder.up.{last - int(m[1])}.block."),
            (r"\.middle\.attention\.", ".mid.attn_1."),
            (r"\.middle\.", ".mid."),
            (r"^quant_conv\.", "encoder.quant_conv."),
            (r"^post_quant_conv\.", "decoder.post_quant_conv."),
        ]
    )
    return KeyMap.of(model, rename, constants)


_SIDE = {"ch": 32, "ch_mult": [1, 1], "num_res_blocks": [1, 1], "z_channels": 4}
MAGVIT = Family(
    name="magvit",
    keys=(r"^encoder\.down\.0\.block\.0\.", r"^decoder\.up\.0\.block\.0\."),
    fits=lambda config: "codebook_dim" in config and "encoder" in config,
    settings=magvit_settings,
    keymap=_keymap,
    network=LFQModel,
    default_config=lambda names: RELEASED,
    releases=(Release("magvitv2", RELEASED),),
    tiny=Tiny({"codebook_dim": 4, "encoder": _SIDE, "decoder": _SIDE}, (0.765536, 0.351238, 0.0, 1.0)),
    constants=("quantize.embedding", "quantize.power_vals"),
)
