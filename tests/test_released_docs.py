"""`docs/released.md` says the truth: its snippets run on tiny checkpoints, its table is complete and its numbers right."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from ddit_parts import write_folder as write_dual
from doc_code import DOCS, blocks, run
from muddit_parts import write_folder
from released_parts import tiny_weights, write_tiny
from released_pipelines import write_chat, write_pictures, write_uni, write_unidisc
from siglip_parts import write_image_parts

from unidiff.families.checkpoint.convert import convert
from unidiff.families.family import FAMILIES as EVERY

NAME = "released.md"
TEXT = (DOCS / NAME).read_text(encoding="utf-8")
FAMILIES = [
    "The pipeline",
    "UniDisc",
    "MDLM",
    "LLaDA",
    "LLaDA-V",
    "Dream",
    "MMaDA",
    "Dynin-Omni",
    "Lumina-DiMOO",
    "Muddit and Meissonic",
    "D-DiT",
    "Image tokenizers",
]


@pytest.fixture(scope="module")
def shelf(tmp_path_factory) -> Path:
    """A folder with `checkpoints/`, in which the snippets are run."""
    root = tmp_path_factory.mktemp("shelf")
    shelf = root / "checkpoints"
    write_tiny(shelf / "magvit", "magvit")
    write_unidisc(shelf / "unidisc", img_length=16)  # 4 x 4 codes
    write_tiny(shelf / "vqvae", "vq_model", "diffusion_pytorch_model.safetensors")
    write_tiny(shelf / "llamagen", "llamagen")
    (shelf / "llamagen" / "model.safetensors").unlink()
    torch.save({"model": tiny_weights("llamagen")}, shelf / "llamagen" / "vq_ds16_c2i.pt")
    write_folder(shelf / "muddit" / "512")
    write_dual(shelf / "ddit")
    talkers = (
        ("llada", "llada-8b-instruct"),
        ("llada-v", "llada-v"),
        ("llada2", "llada2.1-mini"),
        ("dream", "dream-7b"),
        ("mdlm", "mdlm"),
    )
    for family, name in talkers:
        write_chat(shelf / name, family)
    write_uni(shelf / "llada2.0-uni", 32)
    for family, name in (("mmada", "mmada-8b"), ("dynin", "dynin-omni"), ("lumina", "lumina-dimoo")):
        convert(root / family, shelf / name, vocabulary=write_pictures(root / family, family))
        for part in ("image_tokenizer", "tokenizer"):
            shutil.copytree(root / family / part, shelf / name / part)
    write_image_parts(shelf / "llada2.0-uni")
    return root


@pytest.mark.parametrize("family", FAMILIES)
def test_the_snippet_of_a_family_runs(family: str, shelf: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(shelf)
    own = [block for block in blocks(NAME) if block.heading == family]
    assert own, f"{family} has no example"
    space: dict = {"__name__": "snippet"}
    for block in own:
        run(block, NAME, space)
    made = [value for name, value in space.items() if name.startswith(("picture", "pixels"))]
    for pixels in made:
        assert pixels.dtype == torch.float32 and pixels.min() >= 0 and pixels.max() <= 1
    assert made or family in ("The pipeline", "MDLM", "LLaDA", "LLaDA-V", "Dream")


def test_every_snippet_belongs_to_a_family():
    assert {block.heading for block in blocks(NAME)} == set(FAMILIES)


def rows() -> list[list[str]]:
    """Cells of the table of families."""
    table = re.search(r"^\| family \|.*\n\|[-|]+\n((?:\|.*\n)+)", TEXT, re.MULTILINE)
    assert table is not None
    return [[cell.strip() for cell in line.strip("|\n").split("|")] for line in table[1].splitlines()]


def test_the_table_lists_every_release_with_the_memory_of_its_weights():
    listed = {row[1].strip("`"): row[4] for row in rows()}
    variants = {"unidisc-1.4b-512", "unidisc-1.4b-interleaved", "unidisc-medium-vq16", "unidisc-small-vq16"}
    releases = {release.name: (family, release) for family in EVERY.values() for release in family.releases}
    assert set(listed) == set(releases) - variants  # the same networks with other tables
    for name, stated in listed.items():
        family, release = releases[name]
        with torch.device("meta"):
            gigabytes = 2e-9 * sum(p.numel() for p in family.make(release.config).parameters())
        assert stated == f"{gigabytes:.2f} GB", name


def test_names_in_the_text_exist():
    """Modules and compat switches that the page tells of."""
    from unidiff.decoding.cache import AdaptiveCache, MaxLogitCache
    from unidiff.families.ddit.rows import DualLayout
    from unidiff.families.dynin.rows import DyninLayout
    from unidiff.families.llada2.rows import BlockChatLayout
    from unidiff.families.llada2_uni import LLaDA2UniLayout
    from unidiff.families.llada_moe import LLaDAMoELayout
    from unidiff.families.muddit.rows import MudditLayout

    layouts = (BlockChatLayout, LLaDA2UniLayout, LLaDAMoELayout, DyninLayout, MudditLayout, DualLayout)
    for thing in (AdaptiveCache, MaxLogitCache, *layouts):
        assert thing.__name__ in TEXT
    for path in re.findall(r"`((?:tests|unidiff)/[\w/]+\.py)`", TEXT):
        assert (DOCS.parent / path).is_file(), path
