"""Parts of the D-DiT family for tests: those of a golden folder, and tiny ones with random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from golden import golden_cases
from muddit_parts import WEIGHTS, lively_
from safetensors.torch import load_file, save_file
from transformers import T5Config, T5EncoderModel

from unidiff.families.ddit import CLASS, DDIT
from unidiff.families.ddit.denoiser import T5Text
from unidiff.models.dual_mmdit import DualMMDiT
from unidiff.tokens.image.latents import AutoencoderLatents
from unidiff.tokens.text import TextTokenizer

TEXTS = ["a red fox", "two owls on blue", "what is it?", "Q: what is there? A: a dog"]
T5 = dict(
    d_model=12, d_kv=4, num_heads=2, num_layers=1, d_ff=16, relative_attention_num_buckets=4,
    relative_attention_max_distance=8, feed_forward_proj="gated-gelu",
)  # fmt: skip
MODEL = dict(
    sample_size=4, patch_size=1, in_channels=4, out_channels=4, num_layers=2, num_heads=2, head_dim=8, text_dim=12,
    position_side=6,
)  # fmt: skip
VAE = dict(
    latent_channels=4, norm_num_groups=2, layers_per_block=1, block_out_channels=(4, 4), scaling_factor=1.5,
    shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False,
    down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
)  # fmt: skip


def ddit_sets() -> list[Any]:
    """One pytest parameter per golden folder with a configuration, or one that skips."""
    return golden_cases("ddit", having="config.json")


def read_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def golden_network(folder: Path) -> DualMMDiT:
    """With [MASK] as the set has it, which is the last id."""
    config = read_config(folder)
    model, vocabulary = DDIT.load(load_file(folder / "transformer.safetensors"), config["transformer"])
    assert vocabulary is not None and vocabulary.mask_id == config["mask_index"]
    return model


def golden_t5(folder: Path) -> T5Text:
    settings = {k: v for k, v in read_config(folder)["text_encoder"].items() if not k.startswith("_")}
    encoder = T5EncoderModel(T5Config(**settings))
    encoder.load_state_dict(dict(load_file(folder / "text_encoder.safetensors").items()), strict=False)
    return T5Text(encoder)


def golden_vae(folder: Path) -> AutoencoderLatents:
    config = read_config(folder)
    model: Any = AutoencoderKL.from_config(config["vae"])
    model.load_state_dict(dict(load_file(folder / "vae.safetensors").items()))
    return AutoencoderLatents(model, config["transformer"]["patch_size"])


def released_config(model: DualMMDiT, **more: Any) -> dict[str, Any]:
    """Upstream's names for a tiny model's configuration."""
    c = model.config
    return dict(
        _class_name=CLASS,
        vocab_size=c.vocab_size,
        sample_size=c.sample_size,
        patch_size=c.patch_size,
        in_channels=c.in_channels,
        out_channels=c.out_channels,
        num_layers=c.num_layers,
        num_attention_heads=c.num_heads,
        attention_head_dim=c.head_dim,
        joint_attention_dim=c.text_dim,
        caption_projection_dim=c.num_heads * c.head_dim,
        pooled_projection_dim=8,
        pos_embed_max_size=c.position_side,
        **more,
    )


def write_folder(folder: Path, texts: list[str] = TEXTS, length: int = 20, **changes: Any) -> None:
    """Tiny random parts in the released layout; pictures of 8 x 8 pixels, texts of `length` tokens; `changes` of the network."""
    tokenizer = TextTokenizer.train(texts, 300)
    size = tokenizer.size + 1
    model = lively_(DualMMDiT(vocab_size=size, **{**MODEL, **changes}))
    (folder / "transformer").mkdir(parents=True)
    config = released_config(model, eos_token_id=tokenizer.special("eos"))
    (folder / "transformer" / "config.json").write_text(json.dumps(config))
    save_file(DDIT.export(model), folder / "transformer" / WEIGHTS)
    torch.manual_seed(0)
    T5EncoderModel(T5Config(vocab_size=size + 3, **T5)).save_pretrained(folder / "text_encoder")
    tokenizer.save_pretrained(folder / "tokenizer")
    AutoencoderKL(**VAE).save_pretrained(folder / "vae")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(
        json.dumps({"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0})
    )
    (folder / "dual.json").write_text(json.dumps({"length": length, "answer_length": length + 4}))
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "DualDiffSD3Pipeline"}))
