"""The commands around a model: demo, packing, cache profile."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from unidiff.cli.common import (
    Device,
    Dtype,
    Seed,
    Steps,
    WorldName,
    check_folder,
    console,
    height_and_width,
    load_own_model,
    world_of,
)
from unidiff.world import WORLDS


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for demo.png and demo.html.")] = Path("out"),
    world: WorldName = None,
    seed: Seed = 0,
    model: Annotated[
        str | None, typer.Option(help="Model folder, hub model owner/name, or an embedded one; default: the world's.")
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "float32",
) -> None:
    """Show everything the model does on one sheet: demo.png and demo.html."""
    shown = WORLDS.get_or_refuse(world or world_of(model), "--world")
    model = model or (shown.name if shown.model else "emoji")
    check_folder(out, list(shown.demo_files))
    pipe = load_own_model(model, device, dtype, "the demo")
    for path in shown.demo(pipe, out, seed):
        typer.echo(path)


def pack(
    transformer: Annotated[Path, typer.Argument(help="Folder of the trained MaskedTransformer.")],
    image_tokenizer: Annotated[Path, typer.Argument(help="Folder of its image tokenizer.")],
    text_tokenizer: Annotated[Path, typer.Argument(help="Folder of its text tokenizer.")],
    out: Annotated[Path, typer.Argument(help="Model folder to write.")],
    text_length: Annotated[
        int | None, typer.Option(min=1, help="Tokens of the text span, where the transformer's folder does not say it.")
    ] = None,
    image_size: Annotated[
        str | None,
        typer.Option(help="Side in pixels, or WIDTHxHEIGHT, where the transformer's folder does not say it."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="How the transformer is stored.")] = "bfloat16",
    image_dtype: Annotated[
        str, typer.Option(help="How the image tokenizer is stored; half precision moves codes.")
    ] = "float32",
) -> None:
    """Put a transformer and its tokenizers together into one model folder."""
    size = None if image_size is None else height_and_width(image_size, "--image-size")
    from unidiff.pipelines.folder import read_dtype
    from unidiff.pipelines.pack import pack_pipeline

    kinds = {"dtype": read_dtype(dtype), "image_dtype": read_dtype(image_dtype)}
    pack_pipeline(transformer, image_tokenizer, text_tokenizer, out, text_length=text_length, image_size=size, **kinds)
    typer.echo(out)


def profile_cache(
    model: Annotated[
        str, typer.Argument(help="Model folder, hub model owner/name, or the embedded 'emoji' or 'faces'.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for profile.json and heat maps.")] = Path(
        "out/profile-cache"
    ),
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", help="What to draw; repeatable. Default: those of the demo.")
    ] = None,
    task: Annotated[
        list[str] | None, typer.Option("--task", help="text_to_image, caption or inpaint; repeatable. Default: all.")
    ] = None,
    keep: Annotated[float, typer.Option(help="Cosine down to which a feature counts as unchanged.")] = 0.95,
    steps: Steps = None,
    world: WorldName = None,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "float32",
) -> None:
    """Measure how little a model's features change from pass to pass, and recommend a cache."""
    check_folder(out, ["profile.json"])
    pipe = load_own_model(model, device, dtype, "profile-cache")
    from unidiff.evaluation.cache_profile import TASKS, profile_pipeline, summary, write

    prompts = prompt or WORLDS.get_or_refuse(world or world_of(model), "--world").prompts()
    told = lambda what: pipe.set_progress_bar_config(desc=what)  # noqa: E731
    profiles = profile_pipeline(pipe, prompts, task or TASKS, steps, seed, keep, told)
    traits = pipe.transformer.traits
    table, advice = summary(profiles, traits)
    console().print(table)
    for name, chosen in advice.items():
        options = ", ".join(f"{k}={v}" for k, v in chosen.cache.options.items())
        typer.echo(f"{name}: {chosen.cache.policy}{f' ({options})' if options else ''}; {chosen.reason}")
    for path in write(out, model, traits, profiles):
        typer.echo(path)
