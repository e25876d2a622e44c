"""The commands around released checkpoints: information, conversion, verification. Torch is imported inside."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unidiff.cli_common import Device, Model, load_pipeline

if TYPE_CHECKING:
    import torch

    from unidiff.pipeline import UniDiffPipeline

Source = Annotated[str, typer.Argument(help="Weight file, folder or hub name owner/model.")]
Family = Annotated[str | None, typer.Option(help="Family, where config and weights do not tell.")]
Subfolder = Annotated[str | None, typer.Option(help="Folder below it, for instance 512.")]
Stored = Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16 or float16; default: as stored.")]


def info(
    path: Annotated[str | None, typer.Argument(help="Model folder, released checkpoint, hub name or 'emoji'.")] = None,
    model: Model = "emoji",
    family: Family = None,
    subfolder: Subfolder = None,
) -> None:
    """Say what a model is, what it needs, and what this machine offers."""
    name = model if path is None else path
    lines = _about_pipeline(name) if _is_pipeline(name) else _about_checkpoint(name, family, subfolder)
    import diffusers
    import torch
    import transformers

    import unidiff

    here = {
        "unidiff": f"{unidiff.__version__}, torch {torch.__version__}, diffusers {diffusers.__version__}, "
        f"transformers {transformers.__version__}",
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"cpu, {torch.get_num_threads()} threads",
        "model": name,
    }
    for key, value in {**here, **lines}.items():
        typer.echo(f"{key + ':':17}{value}")


def convert(
    source: Source,
    target: Annotated[Path, typer.Argument(help="New folder to write.")],
    dtype: Stored = None,
    family: Family = None,
    subfolder: Subfolder = None,
) -> None:
    """Turn a released checkpoint into unidiff's folder, or such a folder back into the released layout."""
    from unidiff.released.convert import convert as run

    typer.echo(run(source, target, _dtype(dtype), family=family, subfolder=subfolder))


def verify(
    source: Source,
    device: Device = "auto",
    dtype: Stored = None,
    family: Family = None,
    subfolder: Subfolder = None,
) -> None:
    """Compare a released checkpoint with its published values and let it compute; status 1 where something is off."""
    import torch

    from unidiff.released.verify import verify as run

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    result = run(source, _dtype(dtype), device, family=family, subfolder=subfolder)
    typer.echo(f"{source}: {result.family}" + (f", closest to {result.release}" if result.release else ""))
    for check in result.checks:
        typer.echo(str(check))
    if not result.passed:
        raise typer.Exit(1)


def _dtype(name: str | None) -> torch.dtype | None:
    from unidiff.pipelines.checks import read_dtype

    return None if name is None else read_dtype(name)


def _is_pipeline(name: str) -> bool:
    """A unidiff pipeline folder, an embedded model, or a hub name that turns out to hold one."""
    from unidiff.hub import EMBEDDED, locate
    from unidiff.pipelines.folder import is_pipeline

    if name in EMBEDDED:
        return True
    return not Path(name).is_file() and is_pipeline(locate(name))


def _about_checkpoint(name: str, family: str | None, subfolder: str | None) -> dict[str, str]:
    from unidiff.released.describe import describe

    return describe(name, family=family, subfolder=subfolder).lines()


def _about_pipeline(name: str) -> dict[str, str]:
    from unidiff.released.describe import gigabytes, pass_bytes

    pipe: UniDiffPipeline = load_pipeline(name, "cpu")
    config, settings = pipe.transformer.config, pipe.settings
    parts: Any = (pipe.transformer, pipe.image_tokenizer)
    weights = sum(value.nbytes for part in parts for value in part.state_dict().values())
    height, width = pipe.image_size
    codes, known = settings.grid[0] * settings.grid[1], pipe.texts.known_words
    tokens = settings.text_length + codes
    return {
        "family": "unidiff",
        "transformer": f"{_millions(pipe.transformer)} parameters, {config.num_layers} layers, "
        f"width {config.hidden_size}, {config.attention} attention",
        "image tokenizer": f"{_millions(pipe.image_tokenizer)} parameters, {pipe.images.codebook_size} codes, "
        f"factor {pipe.images.factor}",
        "text tokenizer": f"{pipe.texts.size} ids",
        "vocabulary": f"{settings.vocabulary.size} ids",
        "memory": f"{gigabytes(weights)} of weights in {str(pipe.transformer.dtype).removeprefix('torch.')} "
        f"+ about {gigabytes(pass_bytes(pipe.transformer, tokens))} for a pass over {tokens} tokens at batch 1",
        "picture": f"{width} x {height} pixels, {codes} codes",
        "text": f"at most {pipe.text_slots.room} tokens",
        **({} if known is None else {"knows": f"{len(known)} words: {', '.join(sorted(known))}"}),
        "tasks": ", ".join(settings.samplers),
    }


def _millions(module: Any) -> str:
    return f"{sum(p.numel() for p in module.parameters()) / 1e6:.2f} M"
