"""The MAGVIT-v2 tokenizer of Show-o and MMaDA (`showlab/magvitv2`): names and configuration of its weights.

Factor 16, 13 bits. Upstream images are in [-1, 1], shorter side resized (bicubic) and centre-cropped; here they are in
[0, 1] and the model converts them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

from unidiff.families.checkpoint.config_keys import ConfigError, ConfigKeys
from unidiff.families.checkpoint.conv_names import build_tokenizer, read_weights, rename_with, tokenizer_keymap
from unidiff.families.family import Family, tokenizer
from unidiff.schema import Between, Depth, Width
from unidiff.tokens.image.lfq import LFQModel, bit_values, lfq_vectors
from unidiff.tokens.image.vq import VQImageTokenizer

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
    harmless={
        "attn_resolutions": "[5] never matches: there is attention in the middle only",
        "resolution": "only places attention",
        "dropout": "off when a tokenizer is used",
    },
    closed=True,
)
KEYS = ConfigKeys(
    "MAGVIT-v2",
    used={"codebook_dim": Annotated[int, Between(1, 20)], "encoder": Mapping[str, Any], "decoder": Mapping[str, Any]},
    needed=("codebook_dim", "encoder", "decoder"),
    closed=True,
)


def load_magvit(
    source: str | Path | Mapping[str, Any],
    config: Mapping[str, Any] | None = None,
    entry: str | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> VQImageTokenizer:
    """Image tokenizer from released weights.

    Args:
        source: a weight file, a folder that holds one, or names to weights.
        config: `codebook_dim`, `encoder` and `decoder` with upstream's fields; `showlab/magvitv2` if left out.
        entry: where the weights are inside the checkpoint; None for `ema`, `model` or `state_dict` where there is one.
        dtype: cast the weights; None keeps the checkpoint's. float16 is safe: it is computed in float32.
        device: where to load; None for the CPU.

    Raises:
        FileNotFoundError, ValueError: see `open_checkpoint`; weights left over, missing or misshaped; unknown settings.
    """
    kwargs = magvit_config(RELEASED if config is None else config)
    width = kwargs["code_dim"]
    weights = read_weights(source, entry)
    return build_tokenizer(LFQModel, kwargs, _rename(kwargs), weights, dtype, _constants(width), device)


def magvit_state_dict(tokenizer: VQImageTokenizer) -> dict[str, Tensor]:
    """The tokenizer's weights under released names, with the two buffers that the width of a code determines."""
    model = tokenizer.model
    if not isinstance(model, LFQModel):
        raise ValueError(f"the tokenizer holds a {type(model).__name__}; MAGVIT-v2 names are for an LFQModel")
    keymap = tokenizer_keymap(model, _rename(model.config), _constants(model.config.code_dim))
    return keymap.to_theirs(model.state_dict())


def magvit_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """`LFQModel` arguments for an upstream configuration.

    Raises:
        ValueError: an unknown key, or an option that is another network.
    """
    KEYS.check(config)
    kwargs: dict[str, Any] = {"code_dim": config["codebook_dim"]}
    for name in ("encoder", "decoder"):
        side = ConfigKeys(f"MAGVIT-v2 {name}", **SIDES).check(config[name])
        kwargs[f"{name}_channels"] = side["ch"]
        kwargs[f"{name}_multipliers"] = tuple(side["ch_mult"])
        kwargs[f"{name}_depths"] = tuple(side["num_res_blocks"])
    if config["encoder"]["z_channels"] != config["decoder"]["z_channels"]:
        raise ConfigError("MAGVIT-v2 encoder and decoder name different z_channels; they meet in the same latent")
    kwargs["z_channels"] = config["encoder"]["z_channels"]
    return kwargs


def _constants(width: int) -> dict[str, Tensor]:
    return {
        "quantize.embedding": lfq_vectors(torch.arange(2**width), width),
        "quantize.power_vals": bit_values(width),
    }


def _rename(config: Mapping[str, Any]):
    last = len(config["decoder_multipliers"]) - 1
    return rename_with(
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


MAGVIT = Family(
    name="magvit",
    keys=(r"^encoder\.down\.0\.block\.0\.", r"^decoder\.up\.0\.block\.0\."),
    fits=lambda config: "codebook_dim" in config and "encoder" in config,
    load=tokenizer(load_magvit),
    export=lambda images, spelling: magvit_state_dict(images),
    needs_config=False,
    constants=("quantize.embedding", "quantize.power_vals"),
)
