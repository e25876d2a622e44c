"""LlamaGen's image tokenizers VQ-16 and VQ-8 (`vq_ds16_c2i.pt`, `vq_ds8_c2i.pt`, ...): names and configuration.

UniDisc and others use them too. Upstream images are in [-1, 1]; here they are in [0, 1] and the model converts them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

from unidiff.families.checkpoint.config_keys import ConfigError, ConfigKeys
from unidiff.families.checkpoint.conv_names import (
    PREFIXES,
    build_tokenizer,
    read_weights,
    rename_with,
    tokenizer_keymap,
)
from unidiff.families.checkpoint.keymap import strip_prefixes
from unidiff.families.family import Family, tokenizer
from unidiff.schema import Between, Depth, Rows, Width
from unidiff.tokens.image.conv import ConvVQModel
from unidiff.tokens.image.vq import VQImageTokenizer

_COMMON: dict[str, Any] = {
    "ch": 128,
    "num_res_blocks": 2,
    "z_channels": 256,
    "codebook_size": 16384,
    "codebook_embed_dim": 8,
    "codebook_l2_norm": True,
}
RELEASED: dict[str, dict[str, Any]] = {
    "VQ-16": {**_COMMON, "encoder_ch_mult": (1, 1, 2, 2, 4), "decoder_ch_mult": (1, 1, 2, 2, 4)},
    "VQ-8": {**_COMMON, "encoder_ch_mult": (1, 2, 2, 4), "decoder_ch_mult": (1, 2, 2, 4)},
}
_TRAINING = ("commit_loss_beta", "entropy_loss_ratio", "dropout_p", "codebook_show_usage")  # change no result
CONFIG_KEYS = (*RELEASED["VQ-16"], *_TRAINING)
_LEVELS = list[Depth] | tuple[Depth, ...]
KEYS = ConfigKeys(
    "LlamaGen tokenizer",
    used={
        "ch": Width,
        "num_res_blocks": Annotated[int, Between(1, 128)],
        "z_channels": Width,
        "codebook_size": Rows,
        "codebook_embed_dim": Width,
        "codebook_l2_norm": bool,
        "encoder_ch_mult": _LEVELS,
        "decoder_ch_mult": _LEVELS,
    },
    harmless=dict.fromkeys(_TRAINING, "changes no result"),
    closed=True,
)
_USAGE = "quantize.codebook_used"

_rename = rename_with(
    [
        (r"^encoder\.levels\.(\d+)\.resample\.", r"encoder.conv_blocks.\1.downsample.conv."),
        (r"^decoder\.levels\.(\d+)\.resample\.", r"decoder.conv_blocks.\1.upsample.conv."),
        (r"\.levels\.(\d+)\.blocks\.", r".conv_blocks.\1.res."),
        (r"\.levels\.(\d+)\.attentions\.", r".conv_blocks.\1.attn."),
        (r"\.middle\.block_1\.", ".mid.0."),
        (r"\.middle\.attention\.", ".mid.1."),
        (r"\.middle\.block_2\.", ".mid.2."),
        (r"^codebook$", "quantize.embedding.weight"),
        (r"^codebook_used$", _USAGE),
    ]
)


def load_llamagen(
    source: str | Path | Mapping[str, Any],
    config: str | Mapping[str, Any] | None = None,
    entry: str | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> VQImageTokenizer:
    """Image tokenizer from released weights.

    Args:
        source: a weight file, or its content.
        config: "VQ-16", "VQ-8", or upstream's fields, of which those left out are VQ-16's; None for the one of the two
            that has as many levels as the weights.
        entry: where the weights are inside the checkpoint; None for the first of `ema`, `model` and `state_dict` that is
            there.
        dtype: cast the weights; None keeps the checkpoint's. float16 is safe: it is computed in float32.
        device: where to load; None for the CPU.

    Raises:
        FileNotFoundError, ValueError: see `open_checkpoint`; weights left over, missing or misshaped; unknown settings.
    """
    weights = strip_prefixes(read_weights(source, entry), PREFIXES)
    if config is None:
        deep = any(name.startswith(f"encoder.conv_blocks.{len(_levels('VQ-8'))}.") for name in weights)
        config = "VQ-16" if deep else "VQ-8"
    kwargs = llamagen_config(config)
    if (usage := weights.get(_USAGE)) is not None:
        kwargs["usage_window"] = next(iter(getattr(usage, "shape", ())), 0)
    return build_tokenizer(ConvVQModel, kwargs, _rename, weights, dtype, device=device)


def llamagen_state_dict(tokenizer: VQImageTokenizer) -> dict[str, Tensor]:
    """The tokenizer's weights under released names, without the outer entry."""
    model = tokenizer.model
    if not isinstance(model, ConvVQModel):
        raise ValueError(f"the tokenizer holds a {type(model).__name__}; LlamaGen names are for a ConvVQModel")
    return tokenizer_keymap(model, _rename, {}).to_theirs(model.state_dict())


def llamagen_config(config: str | Mapping[str, Any]) -> dict[str, Any]:
    """`ConvVQModel` arguments for a released model's name or upstream's fields.

    Raises:
        ValueError: an unknown name or key.
    """
    if isinstance(config, str):
        if config not in RELEASED:
            raise ConfigError(f"unknown LlamaGen tokenizer {config!r}; expected one of {sorted(RELEASED)}")
        config = RELEASED[config]
    KEYS.check(config)
    c = {**RELEASED["VQ-16"], **config}
    encoder, decoder = tuple(c["encoder_ch_mult"]), tuple(c["decoder_ch_mult"])
    return {
        "codebook_size": c["codebook_size"],
        "code_dim": c["codebook_embed_dim"],
        "encoder_channels": c["ch"],
        "encoder_multipliers": encoder,
        "encoder_depths": (c["num_res_blocks"],) * len(encoder),
        "decoder_channels": c["ch"],
        "decoder_multipliers": decoder,
        "decoder_depths": (c["num_res_blocks"] + 1,) * len(decoder),  # upstream builds one more block on the way up
        "z_channels": c["z_channels"],
        "level_attention": True,
        "l2_norm": bool(c["codebook_l2_norm"]),
    }


def _levels(name: str) -> tuple[int, ...]:
    return RELEASED[name]["encoder_ch_mult"]


LLAMAGEN = Family(
    name="llamagen",
    keys=(r"^encoder\.conv_blocks\.0\.res\.0\.", r"^quantize\.embedding\.weight$"),
    fits=lambda config: bool(config) and set(config) <= set(CONFIG_KEYS),
    load=tokenizer(load_llamagen),
    export=lambda images, spelling: llamagen_state_dict(images),
    needs_config=False,
)
