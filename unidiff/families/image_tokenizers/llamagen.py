"""LlamaGen's image tokenizers VQ-16 and VQ-8 (`vq_ds16_c2i.pt`, `vq_ds8_c2i.pt`, ...): names and configuration.

UniDisc and others use them too. Upstream images are in [-1, 1]; here they are in [0, 1] and the model converts them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any

from unidiff.families.checkpoint.config_keys import Argument, ConfigKeys
from unidiff.families.checkpoint.keymap import KeyMap
from unidiff.families.family import Config, Family, Release, Tiny
from unidiff.families.image_tokenizers.renaming import rename_with
from unidiff.schema import Between, Depth, Rows, Width
from unidiff.tokens.image.conv import ConvVQModel

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
_LEVELS = list[Depth] | tuple[Depth, ...]
KEYS = ConfigKeys(
    "LlamaGen tokenizer",
    used={
        "ch": Argument("encoder_channels", Width),
        "num_res_blocks": Annotated[int, Between(1, 128)],
        "z_channels": Argument("z_channels", Width),
        "codebook_size": Argument("codebook_size", Rows),
        "codebook_embed_dim": Argument("code_dim", Width),
        "codebook_l2_norm": Argument("l2_norm", bool),
        "encoder_ch_mult": _LEVELS,
        "decoder_ch_mult": _LEVELS,
    },
    harmless=("commit_loss_beta", "entropy_loss_ratio", "dropout_p", "codebook_show_usage"),  # of training
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


def llamagen_settings(config: Config) -> dict[str, Any]:
    """`ConvVQModel` arguments for upstream's fields, of which those left out are VQ-16's."""
    full = {**RELEASED["VQ-16"], **config}
    taken = KEYS.read(full)
    encoder, decoder = tuple(full["encoder_ch_mult"]), tuple(full["decoder_ch_mult"])
    return {
        **taken,
        "encoder_multipliers": encoder,
        "encoder_depths": (full["num_res_blocks"],) * len(encoder),
        "decoder_channels": taken["encoder_channels"],
        "decoder_multipliers": decoder,
        "decoder_depths": (full["num_res_blocks"] + 1,) * len(decoder),  # upstream builds one more on the way up
        "level_attention": True,
    }


def _measured(weights: Mapping[str, Any]) -> dict[str, Any]:
    shape: Sequence[int] = getattr(weights.get(_USAGE), "shape", ())
    return {"usage_window": shape[0]} if len(shape) else {}


def _released(names: Iterable[str]) -> Config:
    """Of the two released models the one with as many levels."""
    last = len(RELEASED["VQ-8"]["encoder_ch_mult"])
    deep = any(name.startswith(f"encoder.conv_blocks.{last}.") for name in names)
    return RELEASED["VQ-16" if deep else "VQ-8"]


_TINY = {
    "ch": 32,
    "num_res_blocks": 1,
    "z_channels": 8,
    "codebook_size": 12,
    "codebook_embed_dim": 4,
    "encoder_ch_mult": [1, 1],
    "decoder_ch_mult": [1, 1],
}
LLAMAGEN = Family(
    name="llamagen",
    keys=(r"^encoder\.conv_blocks\.0\.res\.0\.", r"^quantize\.embedding\.weight$"),
    fits=lambda config: bool(config) and set(config) <= {*KEYS.used, *KEYS.harmless},
    settings=llamagen_settings,
    keymap=lambda model, spelling: KeyMap.of(model, _rename),
    network=ConvVQModel,
    measured=_measured,
    default_config=_released,
    releases=tuple(Release(f"llamagen-{name.lower()}", config) for name, config in RELEASED.items()),
    tiny=Tiny(_TINY, (0.67793, 0.442287, 0.0, 1.0), measured={"usage_window": 8}),
)
