"""The command line: `unidiff generate | caption | answer | inpaint | demo | eval | info | pack | convert | ...`."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from unidiff.cli_cache import profile_cache
from unidiff.cli_common import (
    DecodeFlags,
    Filmstrip,
    Gif,
    Longest,
    Out,
    Resize,
    check_outputs,
    open_image,
    report,
    with_decode_flags,
    write_images,
)
from unidiff.cli_released import convert, info, verify
from unidiff.cli_tools import demo, eval_app, pack
from unidiff.process import keep_freed_memory

app = typer.Typer(
    name="unidiff",
    help="Unified multimodal discrete diffusion: pictures from words, words from pictures, and both together.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command()
@with_decode_flags
def generate(
    text: Annotated[
        list[str] | None,
        typer.Argument(help="What to draw. With holes ('a <mask> on <mask:2>') or left out, words are made up too."),
    ] = None,
    out: Out = Path("unidiff.png"),
    negative: Annotated[str | None, typer.Option(help="What guidance leads away from.")] = None,
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="Pictures per text.")] = 1,
    gif: Gif = None,
    filmstrip: Filmstrip = None,
    *,
    flags: DecodeFlags,
) -> None:
    """Draw pictures from words, or picture and words together."""
    check_outputs([out, filmstrip], gif)
    texts = text or []
    holes = [("<mask" in t) for t in texts]
    if len(set(holes)) > 1:
        raise ValueError("some texts have <mask> holes and some do not; run them apart")
    known = bool(texts) and not any(holes)
    if negative is not None and not known:
        raise ValueError("--negative goes with texts that are known in full; leave it out where words are made up")
    pipe = flags.load()
    draw = partial(pipe.text_to_image, texts) if known else partial(pipe.generate, texts or None)
    if negative is not None:
        draw = partial(draw, negative_prompt=negative)
    result = draw(
        num_images_per_prompt=count,
        **flags.options,
        record_trajectory=gif is not None or filmstrip is not None,
    )
    report(result, write_images(result, out), gif, filmstrip)


@app.command()
@with_decode_flags
def caption(
    images: Annotated[list[Path], typer.Argument(help="Pictures to describe.")],
    max_text_tokens: Longest = None,
    resize: Resize = False,
    *,
    flags: DecodeFlags,
) -> None:
    """Describe pictures."""
    pictures = [open_image(path) for path in images]
    pipe = flags.load()
    result = pipe.caption(
        pictures,
        max_text_tokens,
        resize,
        **flags.options,
    )
    for path, words in zip(images, result.texts, strict=True):
        typer.echo(words if len(images) == 1 else f"{path}: {words}")


@app.command()
@with_decode_flags
def answer(
    image: Annotated[Path, typer.Argument(help="The picture.")],
    questions: Annotated[list[str], typer.Argument(help="Questions about it.")],
    max_text_tokens: Longest = None,
    resize: Resize = False,
    *,
    flags: DecodeFlags,
) -> None:
    """Answer questions about a picture."""
    picture = open_image(image)
    pipe = flags.load()
    result = pipe.answer(
        picture,
        questions,
        max_text_tokens,
        resize,
        **flags.options,
    )
    for question, words in zip(questions, result.texts, strict=True):
        typer.echo(words if len(questions) == 1 else f"{question} {words}")


@app.command()
@with_decode_flags
def inpaint(
    image: Annotated[Path, typer.Argument(help="The picture.")],
    mask: Annotated[Path | None, typer.Option(help="Picture of the same size, white where to repaint.")] = None,
    text: Annotated[
        str | None,
        typer.Option(help="The caption; <mask> hides a word, <mask:3> three. Left out: the caption is made up."),
    ] = None,
    out: Out = Path("unidiff.png"),
    paste_back: Annotated[bool, typer.Option("--paste-back", help="Keep the pixels outside the mask.")] = False,
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="Results to make.")] = 1,
    resize: Resize = False,
    gif: Gif = None,
    filmstrip: Filmstrip = None,
    *,
    flags: DecodeFlags,
) -> None:
    """Fill holes in a picture and in its caption together."""
    check_outputs([out, filmstrip], gif)
    picture = open_image(image)
    hole = None if mask is None else open_image(mask)
    pipe = flags.load()
    result = pipe.inpaint(
        picture,
        hole,
        text,
        paste_back=paste_back,
        resize=resize,
        num_images_per_prompt=count,
        **flags.options,
        record_trajectory=gif is not None or filmstrip is not None,
    )
    report(result, write_images(result, out), gif, filmstrip)


for command in (demo, info, pack, convert, verify, profile_cache):
    app.command()(command)
app.add_typer(eval_app)


def main() -> None:
    """Run the command line; what a person did wrong becomes one sentence and exit status 1."""
    keep_freed_memory()
    try:
        app()
    except (ValueError, OSError, KeyError) as error:
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        typer.echo(f"unidiff: {message}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
