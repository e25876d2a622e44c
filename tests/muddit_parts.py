"""Parts of the Muddit family for tests: those of a golden folder, and tiny ones with random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import VQModel
from golden import golden_cases
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from unidiff.families.muddit import MUDDIT
from unidiff.families.muddit.denoiser import MASK_EMBEDDING, ClipText
from unidiff.models.mmdit import MMDiT
from unidiff.tokens.image.vq import VQImageTokenizer

WEIGHTS = "diffusion_pytorch_model.safetensors"
CLIP = dict(
    vocab_size=48,
    hidden_size=16,
    intermediate_size=32,
    projection_dim=12,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=10,
    bos_token_id=46,
    eos_token_id=47,
    pad_token_id=0,
)
MODEL = dict(
    vocab_size=20,
    codebook_size=16,
    text_vocab_size=48,
    num_layers=1,
    num_single_layers=1,
    num_heads=2,
    head_dim=12,
    text_dim=16,
    pooled_dim=12,
    rope_axes=(4, 4, 4),
)
VQ = dict(block_out_channels=(4, 4), latent_channels=4, num_vq_embeddings=16, norm_num_groups=2, layers_per_block=1)


def muddit_sets() -> list[Any]:
    """One pytest parameter per golden folder with a configuration, or one that skips."""
    return golden_cases("muddit", having="config.json")


def read_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def golden_clip(folder: Path, mask_embedding: Tensor | None) -> ClipText:
    encoder = CLIPTextModelWithProjection(CLIPTextConfig(**read_config(folder)["text_encoder"]))
    encoder.load_state_dict(load_file(folder / "text_encoder.safetensors"))
    return ClipText(encoder, mask_embedding)


def golden_vq(folder: Path) -> VQImageTokenizer:
    model: Any = VQModel(**read_config(folder)["vqvae"])
    model.load_state_dict(load_file(folder / "vqvae.safetensors"))
    return VQImageTokenizer(model)


def lively_(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Random weights in place of the zero and one initialisations, so that every term shows."""
    generator = torch.Generator().manual_seed(seed)
    for value in model.state_dict().values():
        noise = torch.randn(value.shape, generator=generator)
        value.copy_(noise * (0.7 * value[0].numel() ** -0.5) if value.ndim > 1 else 1 + 0.3 * noise)
    return model.eval()


def tiny_model(**changes: Any) -> MMDiT:
    return lively_(MMDiT(**{**MODEL, **changes}))  # type: ignore[return-value]


def tiny_clip(mask_embedding: bool = True) -> ClipText:
    torch.manual_seed(0)
    encoder = CLIPTextModelWithProjection(CLIPTextConfig(**CLIP))
    return ClipText(encoder, torch.randn(CLIP["hidden_size"]) if mask_embedding else None)


def released_config(model: MMDiT) -> dict:
    """Upstream's names for a tiny model's configuration."""
    c = model.config
    return dict(
        _class_name="SymmetricTransformer2DModel",
        vocab_size=c.vocab_size,
        codebook_size=c.codebook_size,
        tokenizer_vocab_size=c.text_vocab_size,
        num_layers=c.num_layers,
        num_single_layers=c.num_single_layers,
        num_attention_heads=c.num_heads,
        attention_head_dim=c.head_dim,
        joint_attention_dim=c.text_dim,
        pooled_projection_dim=c.pooled_dim,
        axes_dims_rope=list(c.rope_axes),
        t5_dim=c.adapter_dim,
        downsample=c.downsample,
        upsample=c.downsample,
    )


def write_folder(folder: Path) -> None:
    """Tiny random parts in the released layout, the mask embedding beside it; the alphabet of its words is a to w."""
    model = tiny_model()
    (folder / "transformer").mkdir(parents=True)
    (folder / "transformer" / "config.json").write_text(json.dumps(released_config(model)))
    save_file(MUDDIT.export(model), folder / "transformer" / WEIGHTS)
    torch.manual_seed(0)
    CLIPTextModelWithProjection(CLIPTextConfig(**CLIP)).save_pretrained(folder / "text_encoder")
    letters = [chr(ord("a") + i) for i in range(23)]
    words = [*letters, *(f"{x}</w>" for x in letters), "<|startoftext|>", "<|endoftext|>"]
    CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[], pad_token="a").save_pretrained(
        folder / "tokenizer"
    )
    VQModel(
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        lookup_from_codebook=True,
        **VQ,
    ).save_pretrained(folder / "vqvae")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({"masking_schedule": "linear"}))
    torch.save(torch.randn(CLIP["hidden_size"]), folder.parent / MASK_EMBEDDING)
