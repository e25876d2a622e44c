"""The commands that give a trained pipeline other tokens. Torch is imported inside."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unidiff.files import check_writable

if TYPE_CHECKING:
    from torch import Tensor

change_app = typer.Typer(
    name="change-tokens",
    help="Give a trained pipeline other tokens, and train on from there (`checkpoint.init_from=OUT/transformer`).",
    no_args_is_help=True,
)
Model = Annotated[str, typer.Argument(help="Pipeline: a folder, a hub name, or emoji.")]
Out = Annotated[Path, typer.Argument(help="Folder of the new pipeline.")]
BATCH = 64


@change_app.command()
def image(
    model: Model,
    tokenizer: Annotated[Path, typer.Argument(help="Folder of the new image tokenizer")],
    out: Out,
    shards: Annotated[list[str] | None, typer.Option(help="Tars with pictures that both tokenizers encode")] = None,
    emoji: Annotated[bool, typer.Option("--emoji", help="Emoji scenes in place of shards")] = False,
    pictures: Annotated[
        int, typer.Option("--count", min=1, max=10**9, help="Pictures to compare the codes on")
    ] = 20_000,
    seed: int = 0,
) -> None:
    """Replace the image tokenizer; codes start as what the old tokenizer says of the same cells."""
    from unidiff.pipeline import UniDiffPipeline
    from unidiff.tokens.image.vq import VQImageTokenizer
    from unidiff.train.finetune import with_image_tokenizer

    if emoji == bool(shards):
        raise ValueError("name the pictures by --shards (at least one tar) or by --emoji, one of them")
    check_writable(out / "model_index.json")
    pipe = UniDiffPipeline.from_pretrained(model)
    batches = islice(_batches(shards, pipe.image_size[0], seed), -(-pictures // BATCH))
    with_image_tokenizer(pipe, VQImageTokenizer.from_pretrained(tokenizer), batches).save_pretrained(out)
    typer.echo(f"new image tokenizer -> {out}; train on from {out / 'transformer'}")


@change_app.command()
def text(
    model: Model,
    out: Out,
    add: Annotated[list[str], typer.Option(help="A string that becomes one token, with its leading space if any")],
) -> None:
    """Add text tokens; each starts as the mean of its pieces."""
    from unidiff.pipeline import UniDiffPipeline
    from unidiff.train.finetune import with_text_tokens

    check_writable(out / "model_index.json")
    with_text_tokens(UniDiffPipeline.from_pretrained(model), add).save_pretrained(out)
    typer.echo(f"{len(add)} more text tokens -> {out}; train on from {out / 'transformer'}")


def _batches(shards: list[str] | None, size: int, seed: int) -> Iterator[Tensor]:
    """Endless pictures of the shards, or emoji scenes of all kinds."""
    if shards:
        import torch

        from unidiff.data.shards import ImagePreprocess, ShardSource

        prepare, source = ImagePreprocess(size), ShardSource(shards, ("image",), shuffle=1024, seed=seed, repeat=True)
        pictures = (prepare(sample["image"]) for sample in source)
        return (torch.stack(list(islice(pictures, BATCH))) for _ in count())
    from unidiff.train.image_tokenizer.config import ImageData
    from unidiff.train.image_tokenizer.data import world_images

    scenes = ImageData(world="emoji", kinds=(0.25, 0.25, 0.25, 0.25))
    return (world_images(scenes, seed, start, BATCH) for start in count(0, BATCH))
