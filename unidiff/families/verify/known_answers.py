"""Tiny models of every family with weights from a formula, and what they answered when all reference data passed.

A machine, a torch version or an edit that changes the arithmetic of a family, its key map or its config map changes these
numbers. They say nothing about downloaded weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import VQModel
from torch import Tensor

from unidiff.families.dream.weights import dream_config
from unidiff.families.image_tokenizers.llamagen import llamagen_config
from unidiff.families.image_tokenizers.magvit import magvit_config
from unidiff.families.llada.weights import llada_config
from unidiff.families.mdlm.weights import mdlm_config
from unidiff.families.mmada.weights import mmada_config, mmada_vocabulary
from unidiff.families.muddit.weights import muddit_config
from unidiff.families.registry import FAMILIES
from unidiff.families.unidisc.weights import unidisc_config
from unidiff.families.verify.smoke import answer
from unidiff.models.mmdit import MMDiT
from unidiff.models.transformer import MaskedTransformer
from unidiff.tokens.image.conv import ConvVQModel
from unidiff.tokens.image.lfq import LFQModel
from unidiff.tokens.image.vq import VQImageTokenizer
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
class Known:
    """A tiny model of a family.

    Args:
        config: upstream's.
        make: our model of a config.
        vocabulary: id layout, where the config implies none.
    """

    config: Mapping[str, Any]
    make: Callable[[Mapping[str, Any]], Any]
    vocabulary: Vocabulary | None = None


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if not key.startswith("_")}


_CODES = Vocabulary(40, (0, 20), (24, 40), 21, specials={"eos": 19})
KNOWN: dict[str, Known] = {
    "unidisc": Known(
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
    "mdlm": Known({"model": DIT, "vocab_size": 24}, lambda c: MaskedTransformer(**mdlm_config(c))),
    "llada": Known({"model_type": "llada", **LLADA}, lambda c: MaskedTransformer(**llada_config(c))),
    "dream": Known(
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
    "mmada": Known(
        {**LLADA, "new_vocab_size": 40},
        lambda c: MaskedTransformer(**mmada_config(c)),
        mmada_vocabulary(40, 24, 16, 21, {"eos": 19}),
    ),
    "lumina": Known(
        {"architectures": ["LLaDAForMultiModalGeneration"], **LLADA},
        lambda c: MaskedTransformer(**llada_config(c)),
        _CODES,
    ),
    "muddit": Known(
        {"_class_name": "SymmetricTransformer2DModel", **MMDIT, "tokenizer_vocab_size": 48},
        lambda c: MMDiT(**muddit_config(c)),
    ),
    "meissonic": Known({"_class_name": "Transformer2DModel", **MMDIT}, lambda c: MMDiT(**muddit_config(c))),
    "llamagen": Known(
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
    "magvit": Known(
        {"codebook_dim": 4, "encoder": MAGVIT_SIDE, "decoder": MAGVIT_SIDE},
        lambda c: VQImageTokenizer(LFQModel(**magvit_config(c))),
    ),
    "vq_model": Known(VQ, lambda c: VQImageTokenizer(VQModel(**_plain(c)))),
}

# mean, deviation, first and last value of the answer
NUMBERS: dict[str, tuple[float, float, float, float]] = {
    "unidisc": (0.845297, 1.50554, 0.790528, -1.35141),
    "mdlm": (1.01626, 2.68254, -3.26117, -0.327203),
    "llada": (0.00893976, 0.593655, 0.795968, -0.763248),
    "dream": (-0.00032345, 0.655732, 0.520323, -0.905635),
    "mmada": (0.0315275, 0.731748, 0.736357, 0.731374),
    "lumina": (0.0689936, 0.748344, 0.741017, 0.978048),
    "muddit": (-0.00928485, 0.446267, -0.15253, -0.515088),
    "meissonic": (-0.00921213, 0.157625, -0.15253, -0.218056),
    "llamagen": (0.67793, 0.442287, 0.0, 1.0),
    "magvit": (0.765536, 0.351238, 0.0, 1.0),
    "vq_model": (0.693631, 0.446761, 0.261659, 1.0),
}


def formula_weights(family: str) -> dict[str, Tensor]:
    """Weights of the tiny model under released names: 0.3 sin(...), and around 1 for vectors."""
    known, constants = KNOWN[family], FAMILIES[family].constants
    with torch.device("meta"):
        model = known.make(known.config)
    state = FAMILIES[family].export(model, {})
    return {n: v if n in constants else _wave(tuple(v.shape), sum(n.encode())) for n, v in state.items()}


def known_answer(family: str) -> tuple[float, float, float, float]:
    """What the tiny model answers here, through the family's own loader; compare with `NUMBERS`."""
    known = KNOWN[family]
    model, vocabulary = FAMILIES[family].load(formula_weights(family), known.config, vocabulary=known.vocabulary)
    values = answer(model, vocabulary).double()
    return float(values.mean()), float(values.std()), float(values[0]), float(values[-1])


def agrees(found: tuple[float, ...], expected: tuple[float, ...]) -> bool:
    """Within the rounding of float32 on another machine."""
    return all(math.isclose(a, b, rel_tol=1e-3, abs_tol=1e-4) for a, b in zip(found, expected, strict=True))


def _wave(shape: tuple[int, ...], phase: int) -> Tensor:
    index = torch.arange(math.prod(shape), dtype=torch.float64)
    values = torch.sin(0.7 * index + 0.013 * phase).float().reshape(shape)
    return 0.3 * values if len(shape) > 1 else 1 + 0.2 * values
