"""The commands around a model: demo, evaluation, packing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from unidiff.cli.common import (
    MOST,
    Candidates,
    DecodeFlags,
    Device,
    Dtype,
    Guidance,
    Model,
    Seed,
    Steps,
    WorldName,
    check_folder,
    check_outputs,
    height_and_width,
    load_own_model,
    shared_rows,
    with_decode_flags,
)
from unidiff.world import WORLDS


class EvalGroup(TyperGroup):
    """Besides its own commands one for every world, which is `evaluate` under the world's name."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [*WORLDS, *super().list_commands(ctx)]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return super().get_command(ctx, "WORLD" if cmd_name in WORLDS else cmd_name)


eval_app = typer.Typer(name="eval", help="Measure a model.", no_args_is_help=True, cls=EvalGroup)


@eval_app.command("WORLD", hidden=True)
def evaluate(
    context: typer.Context,
    seed: Seed = 0,
    n: Annotated[int, typer.Option("--n", min=1, max=MOST, help="Cases per category.")] = 300,
    per_task: Annotated[
        int | None,
        typer.Option(
            "--per-task",
            min=1,
            max=10 * MOST,
            help="In place of --n: cases of every task, spread over its categories; 2000 is the full set.",
        ),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(help="Only this task of the world or this metric; repeatable. An unknown one lists them all."),
    ] = None,
    steps: Steps = None,
    guidance: Guidance = None,
    candidates: Candidates = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all numbers to this file.")] = None,
    outcomes: Annotated[
        bool, typer.Option("--outcomes", help="Keep what came out of every case in the JSON, for comparisons.")
    ] = False,
    against: Annotated[
        Path | None,
        typer.Option("--against", help="JSON of another evaluation of the same cases, with outcomes: print changes."),
    ] = None,
    model: Model = "emoji",
    device: Device = "auto",
    dtype: Dtype = "float32",
) -> None:
    """Draw, describe and answer on scenes of this world, read by an exact oracle."""
    check_outputs(json_file=json_path, inputs=(against,))
    if outcomes and json_path is None:
        raise ValueError("--outcomes goes with --json, which names the file to keep them in")
    from rich.console import Console

    from unidiff.evaluation.report import EvaluationReport, compare_reports

    before = None if against is None else EvaluationReport.load(against)
    name = str(context.info_name)
    pipe = load_own_model(model, device, dtype, f"eval {name}")
    asked = {"steps": steps, "guidance_scale": guidance, "num_candidates": candidates, "per_task": per_task}
    options: dict[str, Any] = {option: value for option, value in asked.items() if value is not None}
    options |= {"tasks": tuple(task)} if task else {}
    with Console(stderr=True).status(name) as status:
        say = lambda what: status.update(f"{name}: {what}")  # noqa: E731
        result = WORLDS[name].evaluate(pipe, seed, n, progress=say, **options)
    if json_path is not None:
        result.save(json_path, outcomes)
    Console().print(result.table(f"{name} scenes"))
    if before is not None:
        Console().print(compare_reports(before, result).table(f"compared with {against}"))


@eval_app.command("run")
@with_decode_flags
def run(
    suite: Annotated[str, typer.Argument(help="The benchmark; an unknown one lists them all.")],
    prompts: Annotated[Path, typer.Option(help="Its file (or folder) of prompts or questions, as it is published.")],
    out: Annotated[Path, typer.Option(help="Folder of the results; run again, it goes on.")],
    pictures: Annotated[Path | None, typer.Option(help="Folder of the pictures that it asks about.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, max=MOST, help="Rows of one decode.")] = 16,
    *,
    flags: DecodeFlags,
) -> None:
    """Draw or answer for a public benchmark, in the layout that its own scorer reads; under torchrun processes share it."""
    from unidiff.evaluation.suites.base import SUITES, run_benchmark

    found = SUITES.get_or_refuse(suite, "the benchmark")
    with shared_rows(flags, batch_size) as (pipe, options):
        folder = run_benchmark(found, pipe, prompts, out, pictures, **options)
    if folder is not None:
        typer.echo(f"{folder}: for {found.scorer}")


@eval_app.command("compare")
def compare(
    before: Annotated[Path, typer.Argument(help="JSON of an evaluation, saved with --outcomes.")],
    after: Annotated[Path, typer.Argument(help="JSON of another one of the same cases.")],
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the differences to this file.")] = None,
) -> None:
    """Difference of two evaluations of the same cases, with paired bootstrap intervals."""
    check_outputs(json_file=json_path, inputs=(before, after))
    from rich.console import Console

    from unidiff.evaluation.report import EvaluationReport, compare_reports

    found = compare_reports(EvaluationReport.load(before), EvaluationReport.load(after))
    if json_path is not None:
        found.save(json_path)
    Console().print(found.table(f"{after} - {before}"))


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for demo.png and demo.html.")] = Path("out"),
    world: WorldName = "emoji",
    seed: Seed = 0,
    model: Model = "emoji",
    device: Device = "auto",
    dtype: Dtype = "float32",
) -> None:
    """Show everything the model does on one sheet: demo.png and demo.html."""
    shown = WORLDS.get_or_refuse(world, "--world")
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
    pipe = load_own_model(model, device, dtype, "profile-cache")
    pipe.set_progress_bar_config(disable=True)
    from rich.console import Console

    from unidiff.evaluation.cache_profile import TASKS, profile_pipeline, summary, write
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
