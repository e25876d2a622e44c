"""What the commands share: options, files in and out, loading a model. Torch is imported inside the functions."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

if TYPE_CHECKING:
    from unidiff.pipeline import UniDiffPipeline
    from unidiff.pipelines.output import UniDiffOutput

Model = Annotated[str, typer.Option(help="Model folder, hub model owner/name, or the embedded 'emoji'.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16: how the model computes.")]
Seed = Annotated[int, typer.Option(help="The same seed gives the same result.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="File to write (png, jpg or webp); several get numbers.")]
Gif = Annotated[Path | None, typer.Option(help="Also write the decode as an animated GIF.")]
Filmstrip = Annotated[Path | None, typer.Option(help="Also write the decode as a strip of pictures (PNG).")]
Resize = Annotated[bool, typer.Option("--resize", help="Accept pictures of any size: resize and crop the centre.")]
Longest = Annotated[int | None, typer.Option("--max-text-tokens", help="Longest text to write, in tokens.")]

Steps = Annotated[int | None, typer.Option(help="Passes of the model; default: the model's own.")]
Guidance = Annotated[
    float | None, typer.Option(help="How strictly to follow the input; 1 is off. Default: the model's own.")
]


@dataclass(frozen=True)
class DecodeFlags:
    """Options that every decoding command has; see `with_decode_flags`."""

    seed: Seed = 0
    steps: Steps = None
    guidance: Guidance = None
    temperature: Annotated[float | None, typer.Option(help="Randomness of the draws; 0 takes the best token.")] = None
    cache: Annotated[
        str | None, typer.Option(help="Cache between passes: auto, none, prefix, dual, vicinity, adaptive, max-logit.")
    ] = None
    candidates: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Decodes of each result; the one whose words and picture agree best is kept. Default: the model's own.",
        ),
    ] = None
    model: Model = "emoji"
    device: Device = "auto"
    dtype: Dtype = "float32"

    def load(self) -> UniDiffPipeline:
        """See `load_pipeline`."""
        return load_pipeline(self.model, self.device, self.dtype)

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments for a task of the pipeline: what was asked for, nothing else."""
        asked = {
            "steps": self.steps,
            "guidance_scale": self.guidance,
            "temperature": self.temperature,
            "cache": self.cache,
            "num_candidates": self.candidates,
        }
        return {"generator": self.seed} | {name: value for name, value in asked.items() if value is not None}


def with_decode_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of `DecodeFlags`; it receives them as its argument `flags`."""
    hints, flag_hints = (get_type_hints(of, include_extras=True) for of in (command, DecodeFlags))
    own = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=p.default, annotation=hints[name])
        for name, p in inspect.signature(command).parameters.items()
        if name != "flags"
    ]
    shared = [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=flag_hints[f.name])
        for f in fields(DecodeFlags)
    ]

    def run(**values: Any) -> None:
        flags = DecodeFlags(**{p.name: values.pop(p.name) for p in shared})
        command(**values, flags=flags)

    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__signature__ = inspect.Signature([*own, *shared])  # type: ignore[attr-defined]  # typer reads it
    run.__annotations__ = {p.name: p.annotation for p in (*own, *shared)}
    return run


def load_pipeline(model: str, device: str = "auto", dtype: str = "float32") -> UniDiffPipeline:
    """A pipeline on its device.

    Raises:
        FileNotFoundError, ValueError: a model that cannot be loaded, or a device that is not there.
    """
    import torch
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.set_verbosity_error()
    transformers_logging.set_verbosity_error()

    from unidiff.pipeline import UniDiffPipeline

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"device {device!r} cannot be used here ({reason}); try --device cpu") from error
    pipe = UniDiffPipeline.from_pretrained(model, dtype=dtype).to(device)
    pipe.set_progress_bar_config(disable=not sys.stderr.isatty(), leave=False)
    return pipe


def open_image(path: Path) -> Any:
    """A PIL image, turned upright as its camera noted.

    Raises:
        FileNotFoundError: no such file. ValueError: not a picture.
    """
    from PIL import Image, ImageOps

    if not path.is_file():
        raise FileNotFoundError(f"image file {str(path)!r} does not exist")
    try:
        with Image.open(path) as image:
            image.load()
            return ImageOps.exif_transpose(image)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{str(path)!r} cannot be read as a picture ({error})") from error


def check_outputs(pictures: Sequence[Path | None] = (), gif: Path | None = None, json_file: Path | None = None) -> None:
    """Before any work: every file to write has a fitting ending and a parent that is a folder or can become one.

    Raises:
        ValueError: another ending, a path that is a folder, or one below a file.
    """
    wanted: list[tuple[Path | None, tuple[str, ...]]] = [
        (path, (".png", ".jpg", ".jpeg", ".webp")) for path in pictures
    ]
    wanted += [(gif, (".gif",)), (json_file, (".json",))]
    for path, endings in wanted:
        if path is None:
            continue
        if path.suffix.lower() not in endings:
            raise ValueError(f"output {str(path)!r} must end in {' or '.join(endings)}")
        if path.is_dir():
            raise ValueError(f"output {str(path)!r} is a folder; name a file")
        if blocked := [p for p in path.parents if p.exists() and not p.is_dir()]:
            raise ValueError(f"output {str(path)!r} lies under {str(blocked[0])!r}, which is a file")


def write_images(result: UniDiffOutput, out: Path) -> list[Path]:
    """Save every picture; several get `-1`, `-2`, ... before the ending."""
    from unidiff.pipelines.sheet import save_image

    count = len(result.images)
    width = len(str(count))
    paths = [out] if count == 1 else [out.with_stem(f"{out.stem}-{i + 1:0{width}d}") for i in range(count)]
    for image, path in zip(result.images, paths, strict=True):
        save_image(image, path)
    return paths


def report(result: UniDiffOutput, paths: Sequence[Path], gif: Path | None, filmstrip: Path | None) -> None:
    """Write the recorded way and print one line per picture."""
    if gif is not None:
        result.save_gif(gif)
    if filmstrip is not None:
        result.save_filmstrip(filmstrip)
    for path, text in zip(paths, result.texts, strict=True):
        typer.echo(f"{path}: {text}")
    typer.echo(f"{result.nfe} forward passes in {result.seconds:.2f} s", err=True)
