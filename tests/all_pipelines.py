"""One tiny pipeline of every family with random weights, and pictures of every kind that fit it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ddit_parts import write_folder as write_dual
from muddit_parts import write_folder
from released_pipelines import write_chat, write_pictures, write_uni, write_unidisc
from tiny_pipeline import tiny_pipeline

from unidiff.families.checkpoint.convert import convert
from unidiff.pipeline import UniDiffPipeline

FAMILIES = (
    *("native", "unidisc", "mmada", "dynin", "lumina", "llada", "llada-v", "llada-moe", "llada2", "llada2-uni"),
    *("dream", "mdlm", "muddit"),
)
EVERY = (*FAMILIES, "ddit")
"""With the family that draws by flow matching, which takes no trajectories and no caches where it draws."""


def make_pipelines(folder: Path) -> dict[str, Any]:
    """By family, each of `EVERY`; all but `native` take 6 x 6 pixels (LLaDA-V others too), and Muddit and D-DiT 8 x 8."""
    made: dict[str, Any] = {"native": tiny_pipeline()}
    write_unidisc(folder / "unidisc")
    made["unidisc"] = UniDiffPipeline.from_pretrained(folder / "unidisc")
    for family in ("mmada", "dynin", "lumina"):
        theirs, ours = folder / family / "theirs", folder / family / "ours"
        convert(theirs, ours, vocabulary=write_pictures(theirs, family))
        made[family] = UniDiffPipeline.from_pretrained(
            ours, image_tokenizer=theirs / "image_tokenizer", text_tokenizer=theirs / "tokenizer"
        )
    made |= {family: made[family].sized(6, 6) for family in ("dynin", "lumina")}
    for family in ("llada", "llada-v", "llada-moe", "llada2", "dream", "mdlm"):
        write_chat(folder / family, family)
        made[family] = UniDiffPipeline.from_pretrained(folder / family)
    write_uni(folder / "llada2-uni")
    made["llada2-uni"] = UniDiffPipeline.from_pretrained(folder / "llada2-uni").sized(6, 6)
    (folder / "muddit").mkdir()
    write_folder(folder / "muddit" / "512")
    made["muddit"] = UniDiffPipeline.from_pretrained(folder / "muddit" / "512").sized(8, 8)
    write_dual(folder / "ddit")
    made["ddit"] = UniDiffPipeline.from_pretrained(folder / "ddit")
    for pipe in made.values():
        pipe.set_progress_bar_config(disable=True)
    return made
