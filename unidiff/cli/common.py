"""What the commands share: options, files in and out, loading a model. Torch is imported inside the functions."""

from __future__ import annotations

import inspect
import os
import sys
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, get_type_hints

import typer

from unidiff.files import check_writable
from unidiff.pipelines.options import FLAGS, MOST_ROWS, OPTIONS, own_arguments
from unidiff.process import pick_device

if TYPE_CHECKING:
    from rich.console import Console

    from unidiff.pipeline import UniDiffPipeline
    from unidiff.pipelines.output import UniDiffOutput

Model = Annotated[str, typer.Option(help="Model folder, hub model owner/name, or the embedded 'emoji' or 'faces'.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16: how the model computes.")]
PixelDecoder = Annotated[
    str | None, typer.Option(help="What draws the picture, where a model has several: decoder or decoder-turbo.")
]
PixelSteps = Annotated[int | None, typer.Option(min=1, max=1000, help="Passes of the pixel decoder; default: its own.")]
WorldName = Annotated[
    str | None, typer.Option("--world", help="Whose scenes to show; default: those of the embedded model.")
]
Seed = Annotated[int, typer.Option(help=FLAGS["generator"].help)]
Out = Annotated[Path, typer.Option("--out", "-o", help="File to write (png, jpg or webp); several get numbers.")]
Gif = Annotated[Path | None, typer.Option(help="Also write the decode as an animated GIF.")]
Filmstrip = Annotated[Path | None, typer.Option(help="Also write the decode as a strip of pictures (PNG).")]
Resize = Annotated[bool, typer.Option("--resize", help="Accept pictures of any size: resize and crop the centre.")]
Longest = Annotated[int | None, typer.Option("--max-text-tokens", help="Longest text to write, in tokens.")]
Beside = Annotated[
    int | None,
    typer.Option(
        "--max-text-tokens", help="Answer in words beside the picture, of at most so many tokens, where the model does."
    ),
]
MOST = MOST_ROWS
Steps = Annotated[int | None, typer.Option(help=FLAGS["steps"].help)]
Guidance = Annotated[float | None, typer.Option(help=FLAGS["guidance_scale"].help)]
Candidates = Annotated[int | None, typer.Option(min=1, max=MOST, help=FLAGS["num_candidates"].help)]
OTHER_FLAGS = {
    "negative_prompt": "--negative",
    "mask_image": "--mask",
    "record_trajectory": "--gif or --filmstrip",
    "num_images_per_prompt": "--count",
}


class DecodeFlags(NamedTuple):
    """What every decoding command was given: keyword arguments for a task, and a call that loads the model."""

    options: Mapping[str, Any]
    load: Callable[..., UniDiffPipeline]  # another `model` may be named
    about: Mapping[str, str]  # name of the model, and how it computes


def world_of(model: str | None) -> str:
    """The world whose scenes a model draws where nothing else is said: an embedded model has the name of its world."""
    from unidiff.world import WORLDS

    return model if model is not None and model in WORLDS else "emoji"


def with_decode_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of `DecodeOptions` that have a flag, and those that name a model; it gets `DecodeFlags`.

    One of these that the command declares itself (`model` as an argument, for instance) keeps the place that it has there.
    """
    hints, annotated = get_type_hints(command, include_extras=True), Annotated  # of a type that is only known now
    declared = inspect.signature(command).parameters
    wanted = {name: (name, hints[name], declared[name].default) for name in declared if name != "flags"}
    for option, own in FLAGS.items():
        kind = own.kind if own.default is not None else own.kind | None
        note = annotated[kind, typer.Option(own.name, min=own.least, max=own.most, help=own.help)]  # type: ignore[valid-type]
        wanted[option] = (own.name.strip("-").replace("-", "_"), note, own.default)
    places: dict[str, tuple[Any, Any]] = {
        "model": (Model, "emoji"),
        "device": (Device, "auto"),
        "dtype": (Dtype, "float32"),
    }
    places |= {"pixel_decoder": (PixelDecoder, None), "pixel_steps": (PixelSteps, None)}
    wanted |= {name: (name, *place) for name, place in places.items() if name not in declared}

    def run(**values: Any) -> None:
        asked = {option: values[wanted[option][0]] for option in (*FLAGS, *places)}
        values = {name: value for name, value in values.items() if name in declared}
        place = {name: asked.pop(name) for name in places}
        flags = DecodeFlags(
            {n: v for n, v in asked.items() if v is not None},
            partial(load_pipeline, **place),
            {name: value for name, value in place.items() if value is not None and name != "device"},
        )
        command(**values, flags=flags)

    parameters = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=note)
        for name, note, default in wanted.values()
    ]
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # typer reads it
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run


def quiet_libraries() -> None:
    """They keep what they think of a config to themselves."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.set_verbosity_error()
    transformers_logging.set_verbosity_error()


def load_pipeline(
    model: str,
    device: str = "auto",
    dtype: str = "float32",
    pixel_decoder: str | None = None,
    pixel_steps: int | None = None,
) -> UniDiffPipeline:
    """A pipeline on its device; `FileNotFoundError` or `ValueError` where it cannot be."""
    quiet_libraries()
    from unidiff.pipeline import UniDiffPipeline
    from unidiff.pipelines.decode import UntrainedTask
    from unidiff.tokens.text import UnknownWords

    place = pick_device(device)
    for kind in (UnknownWords, UntrainedTask):
        warnings.simplefilter("ignore", kind)  # `say_notes` says it
    pipe = UniDiffPipeline.from_pretrained(model, dtype=dtype).to(place)
    if (pixel_decoder, pixel_steps) != (None, None):
        if pipe.images is None:
            raise ValueError(f"{pipe.layout.family} knows no pictures; leave --pixel-decoder and --pixel-steps out")
        pipe.images.decode_with(pixel_decoder, pixel_steps)
    pipe.set_progress_bar_config(disable=not sys.stderr.isatty(), leave=False)
    return pipe


Picture = Annotated[str, typer.Argument(help="The picture: a file, or an address (http, https).")]


def file_of(picture: str | None) -> Path | None:
    """The file that a picture is read from, if it is one."""
    return None if picture is None or "://" in picture else Path(picture)


def open_image(path: str) -> Any:
    """A PIL image in RGB, turned upright; see `open_picture`."""
    from unidiff.pictures import open_picture

    return open_picture(path)


def call(method: Any, *inputs: Any, **asked: Any) -> Any:
    """A task of a pipeline with what was asked for on the command line; None and False ask for nothing.

    Raises:
        ValueError: an option that the task does not have, and as the task does.
    """
    asked = {name: value for name, value in asked.items() if value is not None and value is not False}
    known = (*own_arguments(method), *getattr(method, "options", OPTIONS))
    if unknown := [name for name in asked if name not in known]:
        name = unknown[0]
        flag = FLAGS[name].name if name in FLAGS else OTHER_FLAGS.get(name, f"--{name.replace('_', '-')}")
        raise ValueError(f"{flag} does not go with {method.__name__} of this model; leave it out")
    return method(*inputs, **asked)


def load_own_model(model: str, device: str, dtype: str, what: str) -> UniDiffPipeline:
    """A pipeline of unidiff's own models, for the command that `what` names. Raises `ValueError`: a released family."""
    return check_own(load_pipeline(model, device, dtype), what)


def check_own(pipe: UniDiffPipeline, what: str) -> UniDiffPipeline:
    """The pipeline, for the command that `what` names. Raises `ValueError`: it is of a released family."""
    if not hasattr(pipe, "settings"):
        raise ValueError(f"{what} takes unidiff's own models, as training and `unidiff pack` write them; name one")
    return pipe


@contextmanager
def shared_rows(flags: DecodeFlags, batch_size: int) -> Iterator[tuple[UniDiffPipeline, dict[str, Any]]]:
    """A pipeline, and options of `run_rows`, for this process and those that `torchrun` started with it."""
    rank, size = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    if size > 1:
        import torch

        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    pipe = flags.load()
    pipe.set_progress_bar_config(disable=True)
    options = {**flags.options, "batch_size": batch_size, "about": flags.about, "rank": rank, "size": size}
    options["seed"] = options.pop("generator")
    options |= {} if rank else {"say": say_note}
    with bar("rows") as tick:
        yield pipe, {**options, "tick": tick}


def many(prompts: Path, out: Path, batch_size: int, flags: DecodeFlags) -> None:
    """Calls for every line of a file; status 1 where a lone process had to refuse some."""
    from unidiff.pipelines.batch import MANIFEST, read_rows, run_rows

    rows = read_rows(prompts)
    with shared_rows(flags, batch_size) as (pipe, options):
        refused = run_rows(pipe, rows, out, prompts.absolute().parent, **options)
    own = len(range(options["rank"], len(rows), options["size"]))
    typer.echo(f"{out / MANIFEST}: {own} rows" + (f", {refused} refused" if refused else ""))
    if refused and options["size"] == 1:  # torchrun would end the other processes
        raise typer.Exit(1)


def say_note(note: str) -> None:
    """A note, on stderr."""
    typer.echo(f"unidiff: note: {note}", err=True)


def say_notes(result: Any) -> None:
    """What the result notes, on stderr."""
    for note in result.notes:
        say_note(note)


def report(result: UniDiffOutput, out: Path, gif: Path | None, filmstrip: Path | None) -> None:
    """Write the pictures and the recorded way, and print one line per picture."""
    from unidiff.pipelines.sheet import save_image

    paths = numbered(out, len(result.images))
    for image, path in zip(result.images, paths, strict=True):
        save_image(image, path)
    if gif is not None:
        result.save_gif(gif)
    if filmstrip is not None:
        result.save_filmstrip(filmstrip)
    for path, text in zip(paths, result.texts, strict=True):
        typer.echo(f"{path}: {text}")
    say_notes(result)
    if hasattr(result, "nfe"):
        typer.echo(f"{result.nfe} forward passes in {result.seconds:.2f} s", err=True)


PICTURES = (".png", ".jpg", ".jpeg", ".webp")
_ENDINGS = {"--out": PICTURES, "--filmstrip": PICTURES, "--gif": (".gif",), "--json": (".json",)}


def check_outputs(
    out: Path | None = None,
    filmstrip: Path | None = None,
    gif: Path | None = None,
    json_file: Path | None = None,
    count: int = 1,
    inputs: Iterable[Path | None] = (),
) -> None:
    """Everything that a command will write, before it does any work.

    Args:
        count: pictures that `out` stands for; see `numbered`.
        inputs: files that the command reads.

    Raises:
        ValueError: another ending, no ordinary file, a place that cannot be written, two outputs in one file, or an
            output in place of an input. OSError: a name that is too long, links that go round in circles.
    """
    asked = {"--out": out, "--filmstrip": filmstrip, "--gif": gif, "--json": json_file}
    wanted: list[tuple[str, Path]] = []
    for flag, path in asked.items():
        if path is None:
            continue
        if path.suffix.lower() not in _ENDINGS[flag]:
            raise ValueError(f"output {str(path)!r} ({flag}) must end in {' or '.join(_ENDINGS[flag])}")
        wanted += [(flag, each) for each in (numbered(path, count) if flag == "--out" else [path])]
    check_files(wanted, inputs)


def check_folder(out: Path, names: Sequence[str], inputs: Iterable[Path | None] = ()) -> None:
    """A folder that a command will write files of these names into; as `check_outputs`."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"output {str(out)!r} is a file; name a folder")
    check_files([("--out", out / name) for name in names], inputs)


def check_files(wanted: Sequence[tuple[str, Path]], inputs: Iterable[Path | None] = ()) -> None:
    """Files that a command will write, each with the option that names it; as `check_outputs`."""
    read = {mark: path for path in inputs if path is not None for mark in _marks(path)}
    written: dict[object, tuple[str, Path]] = {}
    for flag, path in wanted:
        check_writable(path, flag)
        if path.exists() and not path.stat().st_mode & 0o222:
            raise ValueError(f"output {str(path)!r} ({flag}) is write-protected; name another or unprotect it")
        for mark in _marks(path):
            if mark in read:
                raise ValueError(
                    f"output {str(path)!r} ({flag}) would overwrite the input {str(read[mark])!r}; name another file"
                )
        for mark in (*_marks(path), _folded(path)):
            other = written.setdefault(mark, (flag, path))
            if other != (flag, path):
                raise ValueError(
                    f"{other[0]} {str(other[1])!r} and {flag} {str(path)!r} are the same file; name another for one of them"
                )


def numbered(path: Path, count: int) -> list[Path]:
    """`path` for one picture; several get `-1`, `-2`, ... before the ending."""
    if count == 1:
        return [path]
    width = len(str(count))
    return [path.with_name(f"{path.stem}-{i + 1:0{width}d}{path.suffix}") for i in range(count)]


def _marks(path: Path) -> Iterator[object]:
    """What tells whether two paths are one file: where links lead, and the file's number, for hard links."""
    yield os.path.realpath(path)
    if path.exists():
        status = path.stat()
        yield status.st_dev, status.st_ino


def _folded(path: Path) -> str:
    """The path as file systems see it that do not tell capitals from small letters."""
    return unicodedata.normalize("NFC", os.path.realpath(path)).casefold()


def height_and_width(size: str, flag: str) -> tuple[int, int]:
    """(height, width) of a side in pixels, or WIDTHxHEIGHT. Raises `ValueError` for another text."""
    sides = size.lower().split("x")
    if len(sides) not in (1, 2) or not all(side.isdecimal() and len(side) < 10 and int(side) for side in sides):
        raise ValueError(f"{flag} is {size!r}; expected a number of pixels, or WIDTHxHEIGHT")
    return int(sides[-1]), int(sides[0])


def console(stderr: bool = False) -> Console:
    """Where tables are printed; names of files and models come out as they are, whatever brackets and colons they have."""
    from rich.console import Console

    return Console(stderr=stderr, markup=False, emoji=False)


@contextmanager
def bar(what: str) -> Iterator[Callable[..., None]]:
    """A progress bar with the time left on a terminal, none elsewhere: call it with how many more are done, of how many (None:
    as before), and what comes next where that is of interest."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    errors = console(stderr=True)
    if not errors.is_terminal:  # rich would write an empty line
        yield lambda *_, **__: None
        return
    with Progress(*columns, console=errors, transient=True) as shown:
        task = shown.add_task(what, total=None)

        def tick(more: int, total: int | None = None, now: str = "") -> None:
            shown.update(task, advance=more, total=total, description=f"{what}: {now}" if now else None)

        yield tick
