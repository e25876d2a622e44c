"""The commands around released checkpoints: information, conversion, verification. Torch is imported inside."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unidiff.cli.common import Device, Model, load_pipeline, quiet_libraries
from unidiff.process import pick_device

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
    if path is not None and model not in ("emoji", path):
        raise ValueError(f"two models are named, {path!r} and --model {model!r}; name one")
    name = model if path is None else path
    quiet_libraries()
    if (folder := _pipeline_at(name, subfolder)) is not None:
        if family is not None:
            raise ValueError(f"{name!r} is a pipeline of unidiff; leave --family out")
        lines = _about_pipeline(folder)
    else:
        from unidiff.families.checkpoint.verify import describe

        lines = describe(name, family=family, subfolder=subfolder).lines()
    import diffusers
    import torch
    import transformers

    import unidiff

    versions = [f"{library.__name__} {library.__version__}" for library in (torch, diffusers, transformers)]
    threads = f"cpu, {torch.get_num_threads()} threads"
    here = {
        "unidiff": ", ".join([unidiff.__version__, *versions]),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else threads,
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
    from unidiff.families.checkpoint.convert import convert as run

    quiet_libraries()
    _check_released(source, subfolder)
    typer.echo(run(source, target, _dtype(dtype), family=family, subfolder=subfolder))


def verify(
    source: Source,
    device: Device = "auto",
    dtype: Stored = None,
    family: Family = None,
    subfolder: Subfolder = None,
) -> None:
    """Compare a released checkpoint with its published values and let it compute; status 1 where something is off."""
    from unidiff.families.checkpoint.verify import verify as run

    quiet_libraries()
    _check_released(source, subfolder)
    result = run(source, _dtype(dtype), str(pick_device(device)), family=family, subfolder=subfolder)
    typer.echo(f"{source}: {result.family}" + (f", closest to {result.release}" if result.release else ""))
    for check in result.checks:
        typer.echo(str(check))
    if not result.passed:
        raise typer.Exit(1)


def _dtype(name: str | None) -> torch.dtype | None:
    from unidiff.pipelines.folder import read_dtype

    return None if name is None else read_dtype(name)


def _check_released(name: str, subfolder: str | None) -> None:
    if _pipeline_at(name, subfolder) is not None:
        raise ValueError(f"{name!r} is a pipeline of unidiff already; this command is for released checkpoints")


def _pipeline_at(name: str, subfolder: str | None) -> str | None:
    """The folder of a unidiff pipeline: embedded, on disk, or a hub name that turns out to hold one; None for others."""
    from unidiff.hub import locate
    from unidiff.pipelines.owned import is_pipeline

    if Path(name).exists() and not Path(name).is_dir():
        return None
    folder = locate(name) / (subfolder or "")
    return str(folder) if is_pipeline(folder) else None


def _about_pipeline(name: str) -> dict[str, str]:
    from unidiff.families.checkpoint.verify import gigabytes, pass_bytes

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
        "text": f"at most {pipe.layout.most} tokens",
        **({} if known is None else {"knows": f"{len(known)} words: {', '.join(sorted(known))}"}),
        "tasks": ", ".join(settings.trained) or "none",
    }


def _millions(module: Any) -> str:
    return f"{sum(p.numel() for p in module.parameters()) / 1e6:.2f} M"
