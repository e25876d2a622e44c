"""Training data from the generator of faces. Torch is imported inside."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unidiff.cli.recipes.scenes import Seed, Split, world_commands
from unidiff.files import check_writable

if TYPE_CHECKING:
    from unidiff.worlds.scene_rows import SceneSource


def _scenes(
    seed: Seed = 0,
    split: Split = "train",
    questions: Annotated[int, typer.Option(min=0, max=1000, help="Per face")] = 4,
) -> SceneSource:
    from unidiff.worlds.faces.scenes import FaceGenerator
    from unidiff.worlds.faces.table import FaceScenes

    return FaceScenes(FaceGenerator(seed, split), questions)


faces_app = world_commands(
    "faces",
    "Training data of faces: the image tokenizer that is written down, a text tokenizer, and tables of tokens.",
    _scenes,
    text_length=32,
)


@faces_app.command()
def cells(out: Annotated[Path, typer.Argument(help="Folder for the image tokenizer")]) -> None:
    """Write the image tokenizer: every cell of every face. Nothing is learned."""
    from unidiff.tokens.image.vq import VQImageTokenizer
    from unidiff.worlds.faces.cells import face_tokenizer

    check_writable(out / "config.json")
    tokenizer = VQImageTokenizer(face_tokenizer())
    tokenizer.save_pretrained(out)
    typer.echo(f"{tokenizer.codebook_size} codes -> {out}")
