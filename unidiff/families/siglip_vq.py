"""The image parts of LLaDA2.0-Uni (arXiv 2604.20796): the tokenizer, and the pixel decoders whose folders lie beside its own.

    image_tokenizer/    config.json, preprocessor_config.json, weights, sigvq_embedding.pt
    decoder/            config.json, weights: a Z-Image network that sees features of codes in place of words
    decoder-turbo/      the same, distilled to 8 passes
    vae/                an `AutoencoderKL` of diffusers

How the decoders sample is in no file: `FlowSettings` and `TURBO` hold the reference program's values.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import nn

from unidiff.errors import read_json
from unidiff.families.checkpoint.config_keys import Argument, ConfigError, ConfigKeys
from unidiff.families.checkpoint.keymap import KeyMap, assemble
from unidiff.families.family import Config, Family, Spelling, Tiny
from unidiff.families.image_tokenizers import rename_with
from unidiff.schema import Between, Depth, Epsilon, Layers, Positive, Rows, Width
from unidiff.tokens.image.flow import TURBO, CodeFeatures, FlowDecoder, FlowSettings
from unidiff.tokens.image.siglip_vq import Activation, Level, SiglipVQModel
from unidiff.weights.files import build_on_meta, open_checkpoint, weight_file
from unidiff.weights.model import load_checked

PREPROCESSOR = "preprocessor_config"
VISION = ConfigKeys(
    "the vision_config of a SigLIP-VQ tokenizer",
    used={
        "hidden_size": Argument("hidden_size", Width),
        "intermediate_size": Argument("ffn_size", Width),
        "num_heads": Argument("num_heads", Depth),
        "depth": Argument("num_layers", Depth),
        "patch_size": Argument("patch_size", Annotated[int, Between(1, 1024)]),
        "image_size": Annotated[int, Between(1, 2**20)],
        "hidden_act": Argument("activation", Activation | None, "gelu"),
        "attention_bias": Argument("attention_bias", bool | None, True),
        "layer_norm_eps": Argument("norm_eps", Epsilon | None, 1e-6),
    },
    needed=("image_size",),
    fixed={"spatial_merge_size": (1, None), "in_channels": (3, None)},
    harmless=("attention_dropout", "initializer_range"),
)
CODES = ConfigKeys(
    "the vq_config of a SigLIP-VQ tokenizer",
    used={
        "num_embeddings": Argument("codebook_size", Rows),
        "embed_dim": Argument("code_dim", Width),
        "latent_channels": Width,
    },
    needed=("latent_channels",),
    harmless=("beta", "in_channels", "initializer_range"),  # of training, and of pixels that it never sees
)
_Levels = list[Level] | tuple[Level, ...]
PIXELS = ConfigKeys(
    "the preprocessor_config of a SigLIP-VQ tokenizer",
    used={
        "patch_size": Annotated[int, Between(1, 1024)],
        "merge_size": Argument("merge_size", Annotated[int, Between(1, 64)] | None, 2),
        "image_mean": Argument("mean", _Levels | None, [0.48145466, 0.4578275, 0.40821073]),
        "image_std": Argument("std", _Levels | None, [0.26862954, 0.26130258, 0.27577711]),
        "do_normalize": bool | None,
        "rescale_factor": Positive | None,
    },
    needed=("patch_size", "temporal_patch_size"),
    fixed={"do_rescale": (True, None), "temporal_patch_size": (1,)},
    harmless=(
        *("do_resize", "resample", "size", "min_pixels", "max_pixels", "do_convert_rgb"),  # pictures come in their size
        *("image_processor_type", "processor_class"),
    ),
)


def siglip_settings(config: Config) -> dict[str, Any]:
    """`SiglipVQModel` arguments of the three sections; `ConfigError` for a missing one, and for an option that is not built."""
    for name in ("vision_config", "vq_config", PREPROCESSOR):
        if name not in config:
            hint = f"put {name}.json beside config.json" if name == PREPROCESSOR else "download config.json again"
            raise ConfigError(f"its config has no {name!r}, which an image tokenizer of this kind needs; {hint}")
    vision, codes, pixels = config["vision_config"], config["vq_config"], config[PREPROCESSOR]
    taken = {**VISION.read(vision), **CODES.read(codes), **PIXELS.read(pixels)}
    if codes["latent_channels"] != vision["hidden_size"]:
        sizes = f"latent_channels {codes['latent_channels']} of vq_config and hidden_size {vision['hidden_size']}"
        raise ConfigError(f"{sizes} of vision_config have to be the same")
    if pixels["patch_size"] != vision["patch_size"]:
        sizes = f"{pixels['patch_size']} in {PREPROCESSOR} and {vision['patch_size']} in vision_config"
        raise ConfigError(f"patch_size is {sizes}; expected the same")
    factor = pixels.get("rescale_factor")
    if factor is not None and not math.isclose(factor, 1 / 255, rel_tol=1e-6):
        raise ConfigError(f"config has rescale_factor = {factor}; only 1/255 is supported")
    if pixels.get("do_normalize") is False:
        taken |= {"mean": [0.0] * 3, "std": [1.0] * 3}
    side = vision["image_size"] // vision["patch_size"]
    if not side:
        raise ConfigError(f"config image_size {vision['image_size']} is smaller than a patch of {vision['patch_size']}")
    return {**taken, "position_side": side}


_name = rename_with(
    (r"^patch_embed\.", "visual.patch_embed.proj."),
    (r"^positions$", "visual.embeddings.position_embedding.weight"),
    (r"^blocks\.(\d+)\.(norm\d)\.", r"visual.blocks.\1.\2."),
    (r"^blocks\.(\d+)\.qkv\.", r"visual.blocks.\1.attn.qkv."),
    (r"^blocks\.(\d+)\.proj_out\.", r"visual.blocks.\1.attn.proj."),
    (r"^blocks\.(\d+)\.up\.", r"visual.blocks.\1.mlp.fc1."),
    (r"^blocks\.(\d+)\.down\.", r"visual.blocks.\1.mlp.fc2."),
    (r"^(quant_conv|post_quant_conv)\.", r"vqmodel.\1."),
    (r"^codebook$", "vqmodel.quantize.embedding.weight"),
)


def load_features(path: Path, dtype: torch.dtype | None = None) -> CodeFeatures:
    """`sigvq_embedding.pt`; its sizes are those of its weights.

    Raises:
        FileNotFoundError: nothing there. ValueError: a damaged file, one that could run code, or other weights.
    """
    stored = open_checkpoint(path)
    shapes = [tuple(getattr(stored.get(name), "shape", ())) for name in _FEATURES]
    if [len(shape) for shape in shapes] != [2, 2]:
        raise ValueError(f"{path} does not hold {' and '.join(_FEATURES)}, matrices both; download it again")
    (size, width), (inner, _) = shapes
    model = build_on_meta(CodeFeatures, {"codebook_size": size, "width": width, "inner": inner}, str(path))
    try:
        return assemble(model, KeyMap.of(model), stored, dtype)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


_FEATURES = ("prior_token_embedding.weight", "prior_projector.net.0.proj.weight")
MOST_TOKENS = (32768, 1024, 1024)
"""Places that the network has positions for: one after the other, rows, columns. The reference program sets them so."""
NETWORK = ConfigKeys(
    "a Z-Image pixel decoder",
    used={
        **dict.fromkeys(("in_channels", "dim"), Width),
        **dict.fromkeys(("n_heads", "n_kv_heads", "n_layers"), Depth),
        "n_refiner_layers": Layers,
        "norm_eps": Epsilon,
        "qk_norm": bool,
        **dict.fromkeys(("all_patch_size", "all_f_patch_size", "axes_dims", "axes_lens"), list[Rows]),
        **dict.fromkeys(("rope_theta", "t_scale"), Positive),
        "cap_feat_dim": Width,  # that of the features, whatever it says
    },
    fixed={"siglip_feat_dim": (None,)},
    closed=True,
)


def load_network(folder: Path, width: int, dtype: torch.dtype | None = None) -> Any:
    """The network in a decoder's folder, a diffusers `ZImageTransformer2DModel` for features of this width.

    Raises:
        FileNotFoundError: no config or no weights. ValueError: a config that is not built, or other weights.
    """
    model, keymap, stored = _planned(folder, width)
    try:
        return assemble(model, keymap, stored, dtype)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def _planned(folder: Path, width: int) -> tuple[Any, KeyMap, dict[str, Any]]:
    """The network without weights, their names, and the file, of which only the header was read."""
    from diffusers import ZImageTransformer2DModel

    path = folder / "config.json"
    config = read_json(path, "a decoder's config")
    try:
        NETWORK.check(config)
    except ConfigError as error:
        raise ValueError(f"{path}: {error}") from error
    given = {name: value for name, value in config.items() if not name.startswith("_")}
    given |= {"cap_feat_dim": width, "axes_lens": list(MOST_TOKENS)}
    model = build_on_meta(ZImageTransformer2DModel, given, str(path))
    stored = open_checkpoint(weight_file(folder))
    own = any(name.startswith("cap_embedder.") for name in stored)  # as diffusers calls it
    rename: Callable[[str], str] = str if own else lambda name: re.sub(r"^cap_embedder\.", "semantic_embedder.", name)
    return model, KeyMap.of(model, rename), stored


def load_decoder(
    folder: Path, name: str = "decoder", features: Path | None = None, dtype: torch.dtype | None = None
) -> FlowDecoder:
    """A pixel decoder of the folder of LLaDA2.0-Uni, in evaluation mode.

    Args:
        folder: with `vae` and the decoder in it. name: folder of the decoder. features: `sigvq_embedding.pt`; None for the one
            in `image_tokenizer`.
        dtype: of network and features; None keeps the checkpoint's. The autoencoder is in float32.

    Raises:
        FileNotFoundError: a part is not there. ValueError: one that is damaged, or does not fit the others.
    """
    from diffusers import AutoencoderKL

    codes = load_features(features or folder / "image_tokenizer" / FEATURES, dtype)
    network = load_network(folder / name, codes.prior_token_embedding.embedding_dim, dtype)
    vae = load_checked(AutoencoderKL.from_pretrained, "AutoencoderKL", folder / "vae", torch_dtype=torch.float32)[0]
    if vae.config.latent_channels != network.config.in_channels:
        channels = f"{vae.config.latent_channels} channels, but {folder / name} {network.config.in_channels}"
        raise ValueError(f"the latents of {folder / 'vae'} have {channels}; take both from one model")
    return FlowDecoder(codes, network, vae.eval()).eval()


FEATURES = "sigvq_embedding.pt"
DECODERS: Mapping[str, FlowSettings] = {"decoder": FlowSettings(), "decoder-turbo": TURBO}


@dataclass(frozen=True)
class DecoderFolder:
    """A `StoredDecoder`; fields as of `load_decoder`."""

    folder: Path
    name: str
    features: Path
    settings: FlowSettings

    def load(self) -> FlowDecoder:
        return load_decoder(self.folder, self.name, self.features)

    def weight_bytes(self) -> int:
        parts = (open_checkpoint(self.features), open_checkpoint(weight_file(self.folder / self.name)))
        own = sum(value.shape.numel() * value.dtype.itemsize for part in parts for value in part.values())
        return own + sum(
            4 * value.shape.numel() for value in open_checkpoint(weight_file(self.folder / "vae")).values()
        )


def attach_decoders(model: nn.Module, folder: Path) -> None:
    """Let a tokenizer know the pixel decoders whose folders lie beside its own; each is read when it first decodes.

    Raises:
        FileNotFoundError: a decoder is there, but not the autoencoder or the features that it needs.
    """
    assert isinstance(model, SiglipVQModel)
    root = folder.absolute().parent
    found = {name: settings for name, settings in DECODERS.items() if (root / name / "config.json").is_file()}
    places: Sequence[Path] = (folder / FEATURES, root / "image_tokenizer" / FEATURES, root / FEATURES)
    features = next((place for place in places if place.is_file()), places[0])
    needed = (features, root / "vae" / "config.json")
    if found and (absent := [path for path in needed if not path.is_file()]):
        raise FileNotFoundError(
            f"{absent[0]} does not exist, which {root / next(iter(found))} needs; download it as well"
        )
    model.attach({name: DecoderFolder(root, name, features, settings) for name, settings in found.items()})


_TINY: dict[str, Any] = {
    "vision_config": {
        **dict(hidden_size=16, intermediate_size=24, num_heads=2, depth=2, patch_size=2, image_size=6),
        **dict(spatial_merge_size=1, attention_bias=True, layer_norm_eps=1e-6),
    },
    "vq_config": {"num_embeddings": 16, "embed_dim": 8, "latent_channels": 16},
    PREPROCESSOR: {
        **dict(patch_size=2, temporal_patch_size=1, merge_size=1),
        **dict(image_mean=[0.5] * 3, image_std=[0.5] * 3),
    },
}


def _keymap(model: SiglipVQModel, spelling: Spelling) -> KeyMap:
    return KeyMap.of(model, _name)


SIGLIP_VQ = Family(
    name="siglip_vq",
    keys=(r"(^|\.)visual\.blocks\.0\.attn\.qkv\.weight$", r"(^|\.)vqmodel\.quantize\.embedding\.weight$"),
    fits=lambda config: {"vision_config", "vq_config"} <= config.keys(),
    settings=siglip_settings,
    keymap=_keymap,
    network=SiglipVQModel,
    prefix="model.",
    sections=(PREPROCESSOR,),
    beside=attach_decoders,
    tiny=Tiny(_TINY, (0.78267, 2.3146, -1.90817, 3.00252)),
)
