"""The command that measures whether caches suit a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from unidiff.cli.common import Device, Dtype, Seed, Steps, WorldName, load_pipeline, own_pipeline
from unidiff.cli.outputs import check_folder


def profile_cache(
    model: Annotated[str, typer.Argument(help="Model folder, hub model owner/name, or the embedded 'emoji'.")],
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
    world: WorldName = "emoji",
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "float32",
) -> None:
    """Measure how little a model's features change from pass to pass, and recommend a cache."""
    check_folder(out, ["profile.json"])
    pipe = own_pipeline(load_pipeline(model, device, dtype), "profile-cache")
    pipe.set_progress_bar_config(disable=True)
    from rich.console import Console

    from unidiff.evaluation.cache_profile.report import TASKS, profile_pipeline, summary, write
    from unidiff.world import WORLDS

    prompts = prompt or WORLDS.get_or_refuse(world, "--world").prompts()
    with Console(stderr=True).status("profile") as status:
        profiles = profile_pipeline(pipe, prompts, task or TASKS, steps, seed, keep, status.update)
    traits = pipe.transformer.traits
    table, advice = summary(profiles, traits)
    Console().print(table)
    for name, chosen in advice.items():
        options = ", ".join(f"{k}={v}" for k, v in chosen.cache.options.items())
        typer.echo(f"{name}: {chosen.cache.policy}{f' ({options})' if options else ''}; {chosen.reason}")
    for path in write(out, model, traits, profiles):
        typer.echo(path)
