"""`unidiff eval`: measure a model on a world, draw for a public benchmark, compare two evaluations."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from unidiff.cli.common import (
    MOST,
    DecodeFlags,
    bar,
    check_outputs,
    check_own,
    shared_rows,
    with_decode_flags,
)
from unidiff.world import WORLDS

DEFAULT = "MODEL"


class EvalGroup(TyperGroup):
    """What is no name of a command is a model, and the whole line goes to `evaluate`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        named = not args or args[0] in self.commands or args[0] in ctx.help_option_names
        return super().parse_args(ctx, args if named else [DEFAULT, *args])


eval_app = typer.Typer(
    name="eval",
    help="Measure a model: `unidiff eval MODEL`, or one of these commands (for a folder of such a name write ./run).",
    no_args_is_help=True,
    cls=EvalGroup,
)
Prompts = Annotated[Path, typer.Option(help="Its file (or folder) of prompts or questions, as it is published.")]
Pictures = Annotated[Path | None, typer.Option(help="Folder of the pictures that it asks about.")]
BatchSize = Annotated[int, typer.Option(min=1, max=MOST, help="Rows of one decode; results do not depend on it.")]


@eval_app.command(DEFAULT)
@with_decode_flags
def evaluate(
    model: Annotated[
        str, typer.Argument(help="Model folder, hub model owner/name, or the embedded 'emoji'.")
    ] = "emoji",
    suite: Annotated[
        str | None,
        typer.Option(help="A world (emoji), or with --prompts a public benchmark; an unknown one lists them all."),
    ] = None,
    n: Annotated[int | None, typer.Option("--n", min=1, max=MOST, help="Cases per category.")] = None,
    per_task: Annotated[
        int | None,
        typer.Option(
            "--per-task",
            min=1,
            max=10 * MOST,
            help="Cases of every task, spread over its categories. Default: 280; 2000 is the full set.",
        ),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(help="Only this task of the world or this metric; repeatable. An unknown one lists them all."),
    ] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all numbers to this file.")] = None,
    outcomes: Annotated[
        bool, typer.Option("--outcomes", help="Keep what came out of every case in the JSON, for comparisons.")
    ] = False,
    against: Annotated[
        Path | None,
        typer.Option("--against", help="Another evaluation of the same cases, with outcomes: print changes."),
    ] = None,
    old_model: Annotated[str | None, typer.Option("--model", hidden=True)] = None,
    *,
    flags: DecodeFlags,
) -> None:
    """Draw, describe and answer on scenes of a world, read by an exact oracle."""
    model, suite = model_and_suite(model, suite, old_model)
    world = WORLDS.get_or_refuse(suite, "--suite")
    check_outputs(json_file=json_path, inputs=(against,))
    if outcomes and json_path is None:
        raise ValueError("--outcomes goes with --json, which names the file to keep them in")
    if n is not None and per_task is not None:
        raise ValueError("--n (cases per category) and --per-task both say how many cases there are; give one of them")
    from rich.console import Console

    from unidiff.evaluation.report import EvaluationReport, compare_reports

    before = None if against is None else EvaluationReport.load(against)
    pipe = check_own(flags.load(model=model), f"--suite {suite}")
    options: dict[str, Any] = dict(flags.options)
    seed = options.pop("generator")
    options |= {"n": n} if n is not None else {"n": per_task or PER_TASK, "per_task": per_task or PER_TASK}
    options |= {"tasks": tuple(task)} if task else {}
    with bar(suite) as tick:
        result = world.evaluate(pipe, seed=seed, tick=tick, **options)
    if json_path is not None:
        result.save(json_path, outcomes)
    Console().print(result.table(f"{suite} scenes"))
    if before is not None:
        Console().print(compare_reports(before, result).table(f"compared with {against}"))


PER_TASK = 280


def model_and_suite(model: str, suite: str | None, old_model: str | None) -> tuple[str, str]:
    """What is measured, and on what; `eval WORLD --model MODEL` of older versions is understood.

    Raises:
        ValueError: `--model` beside a model.
    """
    if old_model is not None and (suite is not None or model not in WORLDS):
        raise ValueError(f"eval takes the model as its argument; write `unidiff eval {old_model} --suite NAME`")
    if suite is None and model in WORLDS:  # a world's model has the name of the world
        return old_model or (model if WORLDS[model].model else "emoji"), model
    return model, suite or "emoji"


@eval_app.command("run")
@with_decode_flags
def run(
    suite: Annotated[str, typer.Argument(help="The benchmark; an unknown one lists them all.")],
    prompts: Prompts,
    out: Annotated[Path, typer.Option(help="Folder of the results; run again, it goes on.")],
    pictures: Pictures = None,
    batch_size: BatchSize = 16,
    *,
    flags: DecodeFlags,
) -> None:
    """Draw or answer for a public benchmark, in the layout that its own scorer reads; under torchrun processes share it."""
    run_public(suite, prompts, out, pictures, batch_size, flags)


def run_public(
    suite: str, prompts: Path, out: Path, pictures: Path | None, batch_size: int, flags: DecodeFlags
) -> None:
    """Decode for a public benchmark and say where the scorer's folder is."""
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
