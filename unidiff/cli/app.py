"""The command line: `unidiff generate | caption | answer | inpaint | edit | demo | eval | info | pack | convert | ...`."""

from __future__ import annotations

import io
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from unidiff import __version__
from unidiff.cli.checkpoints import convert, info, verify
from unidiff.cli.common import (
    MOST,
    Beside,
    DecodeFlags,
    Filmstrip,
    Gif,
    Longest,
    Out,
    Picture,
    Resize,
    call,
    check_outputs,
    file_of,
    many,
    open_image,
    report,
    say_notes,
    with_decode_flags,
)
from unidiff.cli.data import data_app, encode, shards, tokenizer_app
from unidiff.cli.evaluation import eval_app
from unidiff.cli.harness import PASSED_ON, lm_eval
from unidiff.cli.recipes.emoji import emoji_app
from unidiff.cli.recipes.faces import faces_app
from unidiff.cli.recipes.fashion import fashion_app
from unidiff.cli.runs import configs_app, runs
from unidiff.cli.scoring import score
from unidiff.cli.studio import studio
from unidiff.cli.tokens import change_app
from unidiff.cli.tools import demo, pack, profile_cache
from unidiff.cli.training import benchmark, finetune, plan, reward, train
from unidiff.errors import exit_status, explain
from unidiff.process import keep_freed_memory
from unidiff.tokens.text import all_have_holes

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
    count: Annotated[int, typer.Option("--count", "-n", min=1, max=MOST, help="Pictures per text.")] = 1,
    gif: Gif = None,
    filmstrip: Filmstrip = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="File of many calls, a prompt or (.jsonl) the arguments of a call in each line; --out names a folder. "
            "Under torchrun processes share it; run again, it goes on."
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, max=MOST, help="With --prompts: rows of one decode.")] = 16,
    max_text_tokens: Beside = None,
    *,
    flags: DecodeFlags,
) -> None:
    """Draw pictures from words, or picture and words together."""
    texts = text or []
    if prompts is not None:
        own = (negative, max_text_tokens, gif, filmstrip)
        if texts or any(value is not None for value in own) or count != 1 or out == Path("unidiff.png"):
            raise ValueError(
                "--prompts goes with --out FOLDER and --batch-size; write texts and negatives into its file"
            )
        return many(prompts, out, batch_size, flags)
    check_outputs(out, filmstrip, gif, count=max(1, len(texts)) * count)
    known = bool(texts) and not all_have_holes(texts)
    if negative is not None and not known:
        raise ValueError("--negative goes with texts that are known in full; leave it out where words are made up")
    pipe = flags.load()
    told = known and max_text_tokens is not None  # words and a picture that answer
    _draw(
        pipe.text_to_image if known and not told else pipe.generate,
        *([texts] if texts and not told else []),
        prompt=texts if told else None,
        max_text_tokens=max_text_tokens,
        num_images_per_prompt=count,
        negative_prompt=negative,
        to=(out, gif, filmstrip),
        flags=flags,
    )


def _draw(task: Any, *given: Any, to: tuple[Path, Path | None, Path | None], flags: DecodeFlags, **asked: Any) -> None:
    """Call a task, and write its pictures, an animation and a film strip of the decode."""
    record = any(way is not None for way in to[1:])
    report(call(task, *given, **asked, **flags.options, record_trajectory=record), *to)


@app.command()
@with_decode_flags
def caption(
    images: Annotated[list[str], typer.Argument(help="Pictures to describe: files, or addresses (http, https).")],
    max_text_tokens: Longest = None,
    resize: Resize = False,
    *,
    flags: DecodeFlags,
) -> None:
    """Describe pictures; one that cannot be read is named, and the others are described."""
    pictures, refused = dict[int, Any](), dict[int, Exception]()
    for number, path in enumerate(images):
        try:
            pictures[number] = open_image(path)
        except (ValueError, OSError) as error:
            refused[number] = error
    pipe = flags.load() if pictures else None
    if pipe is not None:
        if not pipe.layout.reads_pixels:
            pipe.image_size  # noqa: B018  # refuses once for all where the model knows no pictures
        for number in () if pipe.layout.any_size else list(pictures):
            try:
                pipe.image_inputs.images(pictures[number], resize)
            except ValueError as error:
                refused[number] = ValueError(f"{images[number]!r}: {error}")
                del pictures[number]
    if len(images) == len(refused) == 1:
        raise refused[0]
    for reason in refused.values():
        typer.echo(f"unidiff: {explain(reason)}", err=True)
    for number, said in _captions(pipe, pictures, len(images), flags, max_text_tokens, resize).items():
        typer.echo(said if len(images) == 1 else f"{images[number]}: {said}")
    if refused:
        raise typer.Exit(1)


def _captions(
    pipe: Any, pictures: Mapping[int, Any], count: int, flags: DecodeFlags, longest: int | None, resize: bool
) -> dict[int, str]:
    """Captions by number; `count` pictures were asked for, and none depends on which of the others could be read."""
    if not pictures:
        return {}
    from unidiff.pipelines.decode import row_seeds

    seeds = row_seeds(flags.options["generator"], count).tolist()
    groups: dict[object, list[int]] = {}
    for number, picture in pictures.items():  # a model for pictures of any size takes one size at a time
        groups.setdefault(picture.size if pipe.layout.any_size else None, []).append(number)
    words: dict[int, str] = {}
    for numbers in groups.values():
        asked = {**flags.options, "generator": [seeds[n] for n in numbers]}
        shown = [pictures[n] for n in numbers]
        result = call(pipe.caption, shown, max_text_tokens=longest, resize=resize, **asked)
        say_notes(result)
        words |= dict(zip(numbers, result.texts, strict=True))
    return dict(sorted(words.items()))


@app.command()
@with_decode_flags
def answer(
    image: Picture,
    questions: Annotated[list[str], typer.Argument(help="Questions about it.")],
    more: Annotated[
        list[str] | None,
        typer.Option("--image", help="A further picture that the questions are about, where the model reads several."),
    ] = None,
    max_text_tokens: Longest = None,
    resize: Resize = False,
    *,
    flags: DecodeFlags,
) -> None:
    """Answer questions about a picture."""
    picture, others = open_image(image), [open_image(path) for path in more or ()]
    pipe = flags.load()
    if others and not pipe.layout.reads_pixels:
        raise ValueError(f"{pipe.layout.family} reads one picture at a time; leave --image out")
    asked = {"max_text_tokens": max_text_tokens, "resize": resize, **flags.options}
    result = call(pipe.answer, [[picture, *others]] if others else picture, questions, **asked)
    say_notes(result)
    for question, words in zip(questions, result.texts, strict=True):
        typer.echo(words if len(questions) == 1 else f"{question} {words}")


@app.command()
@with_decode_flags
def inpaint(
    image: Picture,
    mask: Annotated[str | None, typer.Option(help="Picture of the same size, white where to repaint.")] = None,
    text: Annotated[
        str | None,
        typer.Option(help="The caption; <mask> hides a word, <mask:3> three. Left out: the caption is made up."),
    ] = None,
    out: Out = Path("unidiff.png"),
    paste_back: Annotated[bool, typer.Option("--paste-back", help="Keep the pixels outside the mask.")] = False,
    count: Annotated[int, typer.Option("--count", "-n", min=1, max=MOST, help="Results to make.")] = 1,
    resize: Resize = False,
    gif: Gif = None,
    filmstrip: Filmstrip = None,
    *,
    flags: DecodeFlags,
) -> None:
    """Fill holes in a picture and in its caption together."""
    check_outputs(out, filmstrip, gif, count=count, inputs=(file_of(image), file_of(mask)))
    picture = open_image(image)
    if mask is not None:
        open_image(mask)  # read again in its own mode; a mistake shows before the model is loaded
    pipe = flags.load()
    _draw(
        pipe.inpaint,
        picture,
        mask_image=mask,
        text=text,
        paste_back=paste_back,
        resize=resize,
        num_images_per_prompt=count if count > 1 else None,
        to=(out, gif, filmstrip),
        flags=flags,
    )


@app.command()
@with_decode_flags
def edit(
    image: Picture,
    prompt: Annotated[str, typer.Argument(help="What to change.")],
    reference: Annotated[str | None, typer.Option(help="A further picture: a style, a subject.")] = None,
    mask: Annotated[str | None, typer.Option(help="Picture of the same size, white where it may change.")] = None,
    max_text_tokens: Beside = None,
    out: Out = Path("unidiff.png"),
    count: Annotated[int, typer.Option("--count", "-n", min=1, max=MOST, help="Results to make.")] = 1,
    resize: Resize = False,
    gif: Gif = None,
    filmstrip: Filmstrip = None,
    *,
    flags: DecodeFlags,
) -> None:
    """Change a picture as told, and answer in words too where the model does."""
    read = tuple(map(file_of, (image, reference, mask)))
    check_outputs(out, filmstrip, gif, count=count, inputs=read)
    picture, further = open_image(image), None if reference is None else open_image(reference)
    if mask is not None:
        open_image(mask)  # read again in its own mode; a mistake shows before the model is loaded
    pipe = flags.load()
    _draw(
        pipe.edit,
        picture,
        prompt,
        reference=further,
        mask_image=mask,
        max_text_tokens=max_text_tokens,
        resize=resize,
        num_images_per_prompt=count if count > 1 else None,
        to=(out, gif, filmstrip),
        flags=flags,
    )


for command in (
    demo,
    studio,
    info,
    pack,
    convert,
    verify,
    profile_cache,
    shards,
    encode,
    train,
    finetune,
    reward,
    plan,
    benchmark,
    runs,
):
    app.command()(command)
eval_app.command("score")(score)
eval_app.command("lm-eval", context_settings=PASSED_ON)(lm_eval)
for group in (eval_app, data_app, tokenizer_app, configs_app, change_app, emoji_app, faces_app, fashion_app):
    app.add_typer(group)


def _say_version(asked: bool) -> None:
    if asked:
        typer.echo(f"unidiff {__version__}")
        raise typer.Exit


@app.callback()
def start(
    version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Say which version this is.")
    ] = False,
) -> None:
    pass


def recipe(*words: str) -> int:
    """Run a command as the script of the same name does: what a person did wrong is one sentence and status 2."""

    def run() -> int:
        try:
            app(list(words))
        except SystemExit as left:
            return int(left.code or 0)
        return 0

    return exit_status(run, failed=2)


def main() -> None:
    """Run the command line; what a person did wrong becomes one sentence and exit status 1."""
    keep_freed_memory()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files may hold what no encoding has
    try:
        sys.exit(exit_status(app, program="unidiff"))
    except SystemExit as end:
        if end.code == 130:  # typer ends without a word
            typer.echo("interrupted", err=True)
        raise
