"""The image parts of a tiny LLaDA2.0-Uni folder: tokenizer, pixel decoders and autoencoder, with random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, ZImageTransformer2DModel
from released_parts import tiny_weights
from safetensors.torch import save_file

from unidiff.families.family import FAMILIES
from unidiff.families.siglip_vq import PREPROCESSOR
from unidiff.tokens.image.flow import CodeFeatures

CHANNELS, WIDTH = 4, 12
NETWORK: dict[str, Any] = {
    **dict(all_patch_size=[2], all_f_patch_size=[1], in_channels=CHANNELS, dim=24, n_layers=1, n_refiner_layers=1),
    **dict(n_heads=2, n_kv_heads=2, norm_eps=1e-5, qk_norm=True, cap_feat_dim=WIDTH, rope_theta=256.0),
    **dict(t_scale=1000.0, axes_dims=[4, 4, 4], axes_lens=[64, 32, 32]),
}


def write_tokenizer(
    folder: Path, config: dict[str, Any], pixels: dict[str, Any], weights: dict[str, torch.Tensor]
) -> None:
    """`image_tokenizer` as it is released: settings in two files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / f"{PREPROCESSOR}.json").write_text(json.dumps(pixels))
    save_file(weights, folder / "model.safetensors")


def write_decoder(folder: Path, names: tuple[str, ...] = ("decoder",), width: int = WIDTH) -> None:
    """Decoders for features of a width, and an autoencoder (two pixels for a latent), in a folder of LLaDA2.0-Uni."""
    torch.manual_seed(1)
    for name in names:
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "config.json").write_text(json.dumps({"_class_name": "ZImageTransformer2DModel", **NETWORK}))
        network = ZImageTransformer2DModel(**{**NETWORK, "cap_feat_dim": width})
        weights = {
            n.replace("cap_embedder.", "semantic_embedder."): torch.randn_like(v) * 0.2
            for n, v in network.state_dict().items()
        }
        save_file(weights, folder / name / "model.safetensors")
    levels: dict[str, Any] = {
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
    }
    vae = AutoencoderKL(
        block_out_channels=(4, 4), latent_channels=CHANNELS, norm_num_groups=2, layers_per_block=1, scaling_factor=0.36,
        shift_factor=0.12, use_quant_conv=False, use_post_quant_conv=False, **levels,
    )  # fmt: skip
    vae.save_pretrained(folder / "vae")


def write_image_parts(folder: Path, names: tuple[str, ...] = ("decoder", "decoder-turbo"), **pixels: Any) -> None:
    """All of them: 16 codes of 2 x 2 pixels, drawn with 4 x 4 each; `pixels` changes the preprocessor's settings."""
    config = dict(FAMILIES["siglip_vq"].tiny.config)
    given = {**config.pop(PREPROCESSOR), **pixels}
    write_tokenizer(folder / "image_tokenizer", config, given, tiny_weights("siglip_vq"))
    write_decoder(folder, names)
    features = CodeFeatures(config["vq_config"]["num_embeddings"], WIDTH).state_dict()
    drawn = {name: torch.randn_like(value) for name, value in features.items()}
    torch.save(drawn, folder / "image_tokenizer" / "sigvq_embedding.pt")
