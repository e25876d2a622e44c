"""Commands that make training data of the scenes of a world, the same for every world. Torch is imported inside."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer
from rich.progress import track

from unidiff.files import check_writable

if TYPE_CHECKING:
    from unidiff.worlds.scene_rows import SceneSource

Seed = Annotated[int, typer.Option(help="Other seeds give other scenes")]
Split = Annotated[str, typer.Option(help="Train, held_out or all")]
Count = Annotated[int, typer.Option(min=1, max=10**9)]
Length = Annotated[int, typer.Option(min=2, max=2**20)]
_STEP = 2048  # scenes that are tokenised together


def world_commands(
    name: str,
    help_text: str,
    scenes: Callable[..., SceneSource],
    text_length: int,
    vocab_size: int = 1024,
    finish: Callable[..., None] = lambda tokenizer, **options: None,
) -> typer.Typer:
    """`shards`, `text` and `table` of one world.

    Args:
        scenes: makes its scenes; its keyword parameters, annotated as those of a command, are options of all three.
        text_length, vocab_size: defaults of the commands.
        finish: told the text tokenizer before it is written, and the options of `scenes`.
    """
    app = typer.Typer(name=name, help=help_text, no_args_is_help=True)

    def shards(
        out: Annotated[Path, typer.Argument(help="Folder for the tars")],
        count: Count = 10_000,
        per_shard: Count = 1000,
        **options: Any,
    ) -> None:
        """Write raw webdataset shards."""
        from unidiff.data.collect import write_note
        from unidiff.data.tar import ShardWriter
        from unidiff.worlds.scene_rows import raw_samples

        check_writable(out / "00000.tar")
        if any(out.glob("*.tar")):
            raise ValueError(f"{str(out)!r} holds shards already; name another folder")
        source = scenes(**options)
        height, width = source.pictures(0, 1).shape[-2:]
        with ShardWriter(out, per_shard) as writer:
            for key, members in track(raw_samples(source, count), "scenes", total=count):
                writer.write(key, members)
        write_note(out, (height, width), writer.written)

    def text(
        out: Annotated[Path, typer.Argument(help="Folder for the tokenizer")],
        vocab_size: Count = vocab_size,
        count: Count = 20_000,
        **options: Any,
    ) -> None:
        """Train the byte-level BPE on the generator's own captions, questions and answers."""
        from unidiff.tokens.text import TextTokenizer, words_of
        from unidiff.worlds.scene_rows import corpus

        texts = list(corpus(scenes(**options), count))
        tokenizer = TextTokenizer.train(texts, vocab_size)
        tokenizer.known_words = {word for line in texts for word in words_of(line)}
        finish(tokenizer, **options)
        tokenizer.save_pretrained(out)
        typer.echo(f"{tokenizer.size} ids -> {out}")

    def table(
        out: Annotated[Path, typer.Argument(help="File to write, .safetensors")],
        image_tokenizer: Annotated[Path, typer.Option(help="Folder of the image tokenizer")],
        text_tokenizer: Annotated[Path, typer.Option(help="Folder of the text tokenizer")],
        count: Count = 200_000,
        text_length: Length = text_length,
        captions: Annotated[int, typer.Option(min=1, max=1000)] = 4,
        **options: Any,
    ) -> None:
        """Write a token table for `unidiff train`."""
        import torch

        from unidiff.tokens.image.vq import VQImageTokenizer
        from unidiff.tokens.text import TextTokenizer
        from unidiff.train.data.source import TokenTable
        from unidiff.worlds.scene_rows import scene_vocabulary, token_rows

        check_writable(out)
        image, words = VQImageTokenizer.from_pretrained(image_tokenizer), TextTokenizer.from_pretrained(text_tokenizer)
        source = scenes(**options)
        parts = [
            token_rows(source, start, min(_STEP, count - start), image, words, text_length, captions)
            for start in track(range(0, count, _STEP), "scenes")
        ]
        tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        TokenTable(tensors, scene_vocabulary(words, image.codebook_size)).save(out)
        typer.echo(f"{count} rows -> {out}")

    for command in (shards, text, table):
        app.command()(_with_options(command, scenes))
    return app


def _with_options(command: Callable[..., None], scenes: Callable[..., Any]) -> Callable[..., None]:
    """The command with the keyword parameters of `scenes` in place of its `**options`."""
    parameters = []
    for function in (command, scenes):
        hints = get_type_hints(function, {**globals(), **_UNREAD, **function.__globals__}, include_extras=True)
        for name, own in inspect.signature(function).parameters.items():
            if own.kind is not inspect.Parameter.VAR_KEYWORD:
                kind = inspect.Parameter.KEYWORD_ONLY
                parameters.append(inspect.Parameter(name, kind, default=own.default, annotation=hints[name]))

    def run(**values: Any) -> None:
        command(**values)

    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # typer reads it
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run


_UNREAD = {"SceneSource": Any}  # named in annotations, imported only where they are used
