"""Tiny released checkpoints of every family, with random weights under released names, and those of the golden sets."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import VQModel
from golden import golden_folders, golden_root
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from unidiff.models.mmdit import MMDiT
from unidiff.models.transformer import MaskedTransformer
from unidiff.released.dream import dream_config
from unidiff.released.families import FAMILIES
from unidiff.released.llada import llada_config
from unidiff.released.llamagen import CONFIG_KEYS, llamagen_config
from unidiff.released.magvit import magvit_config
from unidiff.released.mdlm import mdlm_config
from unidiff.released.mmada import mmada_config, mmada_vocabulary
from unidiff.released.muddit import muddit_config
from unidiff.released.unidisc import unidisc_config
from unidiff.tokens.conv_vq import ConvVQModel
from unidiff.tokens.image_lfq import LFQModel
from unidiff.tokens.image_vq import VQImageTokenizer
from unidiff.tokens.vocabulary import Vocabulary

DIT = {"hidden_size": 16, "n_blocks": 2, "n_heads": 2, "cond_dim": 8}
LLADA = {
    "d_model": 16,
    "n_heads": 2,
    "n_kv_heads": 2,
    "n_layers": 2,
    "mlp_hidden_size": 24,
    "vocab_size": 40,
    "embedding_size": 40,
    "mask_token_id": 30,
    "eos_token_id": 29,
    "rope_theta": 5e5,
}
MMDIT = {
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
VQ = {
    "_class_name": "VQModel",
    "block_out_channels": [4, 4],
    "latent_channels": 4,
    "num_vq_embeddings": 16,
    "norm_num_groups": 2,
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "lookup_from_codebook": True,
}
MAGVIT_SIDE = {"ch": 32, "ch_mult": [1, 1], "num_res_blocks": [1, 1], "z_channels": 4}


@dataclass(frozen=True)
class Tiny:
    """How a tiny checkpoint of a family is made: upstream's config, and our model of it."""

    config: Mapping[str, Any]
    make: Callable[[Mapping[str, Any]], Any]
    vocabulary: Vocabulary | None = None


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if not key.startswith("_")}


CODES = Vocabulary(40, (0, 20), (24, 40), 21, specials={"eos": 19})
TINY: dict[str, Tiny] = {
    "unidisc": Tiny(
        {
            "model": {
                **DIT,
                "norm_type": "rms",
                "qk_norm": True,
                "modality_embed": True,
                "text_vocab_size": 17,
                "image_vocab_size": 12,
            }
        },
        lambda c: MaskedTransformer(**unidisc_config(c)),
    ),
    "mdlm": Tiny({"model": DIT, "vocab_size": 24}, lambda c: MaskedTransformer(**mdlm_config(c))),
    "llada": Tiny({"model_type": "llada", **LLADA}, lambda c: MaskedTransformer(**llada_config(c))),
    "dream": Tiny(
        {
            "model_type": "Dream",
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 24,
            "vocab_size": 40,
            "mask_token_id": 30,
            "eos_token_id": 29,
        },
        lambda c: MaskedTransformer(**dream_config(c)),
    ),
    "mmada": Tiny(
        {**LLADA, "new_vocab_size": 40},
        lambda c: MaskedTransformer(**mmada_config(c)),
        mmada_vocabulary(40, 24, 16, 21, {"eos": 19}),
    ),
    "lumina": Tiny(
        {"architectures": ["LLaDAForMultiModalGeneration"], **LLADA},
        lambda c: MaskedTransformer(**llada_config(c)),
        CODES,
    ),
    "muddit": Tiny(
        {"_class_name": "SymmetricTransformer2DModel", **MMDIT, "tokenizer_vocab_size": 48},
        lambda c: MMDiT(**muddit_config(c)),
    ),
    "meissonic": Tiny({"_class_name": "Transformer2DModel", **MMDIT}, lambda c: MMDiT(**muddit_config(c))),
    "llamagen": Tiny(
        {
            "ch": 32,
            "num_res_blocks": 1,
            "z_channels": 8,
            "codebook_size": 12,
            "codebook_embed_dim": 4,
            "encoder_ch_mult": [1, 1],
            "decoder_ch_mult": [1, 1],
        },
        lambda c: VQImageTokenizer(ConvVQModel(**llamagen_config(c), usage_window=8)),
    ),
    "magvit": Tiny(
        {"codebook_dim": 4, "encoder": MAGVIT_SIDE, "decoder": MAGVIT_SIDE},
        lambda c: VQImageTokenizer(LFQModel(**magvit_config(c))),
    ),
    "vq_model": Tiny(VQ, lambda c: VQImageTokenizer(VQModel(**_plain(c)))),
}


def tiny_weights(family: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Random weights of a tiny checkpoint under released names."""
    torch.manual_seed(seed)
    tiny = TINY[family]
    state = FAMILIES[family].export(tiny.make(tiny.config), {})
    drawn = {}
    for name, value in state.items():
        fixed = name in FAMILIES[family].constants or not value.is_floating_point()
        drawn[name] = value.contiguous().clone() if fixed else torch.randn(value.shape).mul_(0.2).to(dtype)
    return drawn


def write_tiny(folder: Path, family: str, file: str = "model.safetensors", **changes: Any) -> dict[str, Tensor]:
    """A released folder: `config.json` (with changes) and the weights; returns the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    state = tiny_weights(family)
    (folder / "config.json").write_text(json.dumps({**TINY[family].config, **changes}))
    save_file(state, folder / file)
    return state


@dataclass(frozen=True)
class GoldenCheckpoint:
    """A reference checkpoint: its weight file, upstream's config, and the id layout where the config implies none."""

    path: Path
    config: Mapping[str, Any]
    vocabulary: Vocabulary | None = None

    def write(self, folder: Path) -> dict[str, Tensor]:
        """A released folder with it; returns the weights."""
        state = load_file(self.path)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config))
        save_file(state, folder / "model.safetensors")
        return state


def golden_checkpoints() -> list[GoldenCheckpoint]:
    """Every weight file of the golden sets whose names are those of a family that is built."""
    found = []
    for root in sorted(p.name for p in golden_root().iterdir()) if golden_root().is_dir() else []:
        for folder in golden_folders(root):
            for path in sorted(folder.glob("*.safetensors")):
                with safe_open(path, framework="pt") as file:
                    names = list(file.keys())
                if any(f.has_keys(names) for f in FAMILIES.values()):
                    found.append(_golden(path))
    return found


def _golden(path: Path) -> GoldenCheckpoint:
    """The config is a section called as the file, or `model_config`, or `model`; else the upstream keys of the whole."""
    full = json.loads((path.parent / "config.json").read_text())
    if "vocab" in full:  # MMaDA: its config holds the rows, the layout is declared
        ids = full["vocab"]
        layout = (
            ids["new_vocab_size"],
            ids["image_token_offset"],
            ids["codebook_size"],
            ids["mask"],
            {"eos": ids["eos"]},
        )
        return GoldenCheckpoint(path, {**full["model"], "new_vocab_size": layout[0]}, mmada_vocabulary(*layout))
    if "tokens" in full:  # Lumina
        ids, config = full["tokens"], full["model_config"]
        start, size = ids["vocab_offset"], config["vocab_size"]
        vocabulary = Vocabulary(size, (0, start), (start, start + ids["codebook_size"]), ids["mask"])
        return GoldenCheckpoint(path, {"architectures": ["LLaDAForMultiModalGeneration"], **config}, vocabulary)
    if path.stem in full or "model_config" in full:
        return GoldenCheckpoint(path, full.get(path.stem, full.get("model_config")))
    if "d_model" in full.get("model", {}):
        return GoldenCheckpoint(path, full["model"])
    for known in (CONFIG_KEYS, ("codebook_dim", "encoder", "decoder")):
        if known[0] in full:
            return GoldenCheckpoint(path, {key: full[key] for key in known if key in full})
    return GoldenCheckpoint(path, full)
