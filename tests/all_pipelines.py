"""One tiny pipeline of every family with random weights, and pictures of every kind that fit it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from muddit_parts import write_folder
from released_parts import write_tiny
from released_pipelines import write_chat, write_pictures
from tiny_pipeline import tiny_pipeline

from unidiff.families.checkpoint.convert import convert
from unidiff.families.unidisc import UNIDISC
from unidiff.models.transformer import MaskedTransformer
from unidiff.pipeline import UniDiffPipeline
from unidiff.pipelines.muddit import MudditPipeline
from unidiff.tokens.text import TextTokenizer

FAMILIES = ("native", "unidisc", "mmada", "lumina", "llada", "dream", "muddit")
UNIDISC_CONFIG = {
    "hidden_size": 16,
    "n_blocks": 1,
    "n_heads": 2,
    "norm_type": "rms",
    "qk_norm": True,
    "modality_embed": True,
    "rope_2d": True,
    "txt_length": 10,
    "img_length": 9,
    "image_vocab_size": 12,
}


def write_unidisc(folder: Path) -> None:
    """UniDisc beside LlamaGen's tokenizer (factor 2, 12 codes) and a text tokenizer: 3 x 3 codes, 6 x 6 pixels."""
    texts = TextTokenizer.train(["a red fox on a hill", "two owls"], 300)
    texts.save_pretrained(folder / "text_tokenizer")
    config = {"model": {**UNIDISC_CONFIG, "text_vocab_size": texts.size + 1}}
    torch.manual_seed(0)
    model = MaskedTransformer(**UNIDISC.settings(config))
    for value in model.parameters():
        torch.nn.init.normal_(value, std=0.3)
    (folder / "config.json").write_text(json.dumps(config))
    torch.save({"model": {f"_orig_mod.{n}": v for n, v in UNIDISC.export(model).items()}}, folder / "unidisc.pt")
    write_tiny(folder / "image_tokenizer", "llamagen")


def make_pipelines(folder: Path) -> dict[str, Any]:
    """By family, each of `FAMILIES`; all but `native` take 6 x 6 pixels, and Muddit 8 x 8."""
    made: dict[str, Any] = {"native": tiny_pipeline()}
    (folder / "unidisc").mkdir()
    write_unidisc(folder / "unidisc")
    made["unidisc"] = UniDiffPipeline.from_pretrained(folder / "unidisc")
    for family in ("mmada", "lumina"):
        theirs, ours = folder / family / "theirs", folder / family / "ours"
        convert(theirs, ours, vocabulary=write_pictures(theirs, family))
        made[family] = UniDiffPipeline.from_pretrained(
            ours, image_tokenizer=theirs / "image_tokenizer", text_tokenizer=theirs / "tokenizer"
        )
    made["lumina"] = made["lumina"].sized(6, 6)
    for family in ("llada", "dream"):
        write_chat(folder / family, family)
        made[family] = UniDiffPipeline.from_pretrained(folder / family)
    (folder / "muddit").mkdir()
    write_folder(folder / "muddit" / "512")
    made["muddit"] = MudditPipeline(UniDiffPipeline.from_pretrained(folder / "muddit" / "512").parts, (8, 8))
    for pipe in made.values():
        if hasattr(pipe, "set_progress_bar_config"):
            pipe.set_progress_bar_config(disable=True)
    return made
