"""`unidiff eval`: measure a model on a world, draw for a public benchmark, compare two evaluations."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from unidiff.cli.common import (
    MOST,
    DecodeFlags,
    bar,
    check_folder,
    check_outputs,
    check_own,
    console,
    say_note,
    shared_rows,
    with_decode_flags,
)
from unidiff.files import locked
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
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="Folder for report.html, report.json, CSV and what was drawn; run again, it goes on."
        ),
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
    batch_size: BatchSize = 64,
    prompts: Annotated[
        Path | None, typer.Option(help="Prompts of a public benchmark, as `eval run` takes them.")
    ] = None,
    pictures: Pictures = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all numbers to this file.")] = None,
    outcomes: Annotated[
        bool, typer.Option("--outcomes", help="Keep what came out of every case in the JSON, for comparisons.")
    ] = False,
    against: Annotated[
        Path | None,
        typer.Option("--against", help="Another evaluation of the same cases (its --out or JSON): print changes."),
    ] = None,
    old_model: Annotated[str | None, typer.Option("--model", hidden=True)] = None,
    *,
    flags: DecodeFlags,
) -> None:
    """Draw, describe and answer on the scenes of a world, read by an exact oracle; --out writes a report of it."""
    model, suite = model_and_suite(model, suite, old_model)
    own = {"--n": n, "--per-task": per_task, "--task": task, "--json": json_path, "--against": against}
    if suite not in WORLDS:
        return _public(suite, prompts, out, pictures, batch_size, flags._replace(**_named(flags, model)), own)
    if prompts is not None or pictures is not None:
        raise ValueError(f"--prompts and --pictures go with a public benchmark; the suite {suite} draws its own cases")
    before = None if against is None else _json_of(against)
    check_outputs(json_file=json_path, inputs=(before,))
    if outcomes and json_path is None:
        raise ValueError("--outcomes goes with --json, which names the file to keep them in")
    if n is not None and per_task is not None:
        raise ValueError("--n (cases per category) and --per-task both say how many cases there are; give one of them")
    options: dict[str, Any] = {name: value for name, value in flags.options.items() if name != "generator"}
    count = n or per_task or PER_TASK
    options |= {"n": count, "seed": flags.options["generator"]} | ({"per_task": count} if n is None else {})
    options |= {"tasks": tuple(dict.fromkeys(task))} if task else {}
    from unidiff.evaluation.paired import compare_reports
    from unidiff.evaluation.report import EvaluationReport

    other = None if before is None else EvaluationReport.load(before)
    if out is not None:
        _check_out(out, (before,))
    pipe = flags.load(model=model)
    if not pipe.layout.latents:  # training writes dual models in the layout of a released family
        check_own(pipe, f"--suite {suite}")
    about = {"suite": suite, "model": model, "dtype": flags.about["dtype"]}
    result = _evaluated(pipe, suite, out, about, options | {"batch_size": batch_size})
    if json_path is not None:
        result.save(json_path, outcomes)
    console().print(result.table(f"{suite} scenes"))
    if left_out := result.about.get("left_out"):
        say_note(f"left out, as this model cannot do it: {left_out}")
    if other is not None:
        console().print(compare_reports(other, result).table(f"compared with {against}"))
    if out is not None:
        typer.echo(out / "report.html")


def _evaluated(pipe: Any, suite: str, out: Path | None, about: dict[str, Any], options: dict[str, Any]) -> Any:
    """The report of a suite; with `out` its rows are kept there, and its files are written."""
    from unidiff.evaluation.benchmark.measure import model_hash
    from unidiff.evaluation.kept import KeptRows
    from unidiff.evaluation.report_page import write_files
    from unidiff.evaluation.suites.base import RESULTS, own_settings
    from unidiff.process import versions

    with bar(suite) as tick:
        evaluate = partial(WORLDS[suite].evaluate, pipe, tick=tick, **options)
        if out is None:
            result = evaluate()
            result.about |= about
            return result
        with locked(out, "evaluation"):
            about |= {"model_hash": model_hash(pipe), "settings": own_settings(pipe)}
            asked = {name: value for name, value in options.items() if name != "batch_size"}
            result = evaluate(kept=KeptRows(out / RESULTS, about | {"options": asked}, pipe.device))
            result.about |= about | {"versions": versions(pipe.device)}
            write_files(result, out, f"Evaluation of {about['model']}")
    return result


def _check_out(out: Path, inputs: Sequence[Path | None]) -> None:
    """Raise `ValueError` where the files of an evaluation cannot be written, or are of something else."""
    from unidiff.evaluation.report_page import FILES
    from unidiff.evaluation.suites.base import check_no_rows

    check_folder(out, FILES, inputs)
    check_no_rows(out)
    for name in FILES:
        if (out / name).exists() and not (out / "rows").exists():
            raise ValueError(f"{str(out / name)!r} is there and of another command; name another folder (--out)")


def _named(flags: DecodeFlags, model: str) -> dict[str, Any]:
    return {"load": partial(flags.load, model=model), "about": {**flags.about, "model": model}}


def _public(
    suite: str,
    prompts: Path | None,
    out: Path | None,
    pictures: Path | None,
    batch_size: int,
    flags: DecodeFlags,
    own: dict[str, Any],
) -> None:
    """`eval run` by the other spelling."""
    from unidiff.evaluation.suites.base import SUITES

    if suite not in SUITES:
        near = difflib.get_close_matches(suite, [*WORLDS, *SUITES], 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"--suite is {suite!r:.80}; expected one of {', '.join([*WORLDS, *SUITES])}{hint}")
    if prompts is None or out is None:
        raise ValueError(f"{suite} needs --prompts, the file that the benchmark publishes, and --out")
    if given := [flag for flag, value in own.items() if value]:
        raise ValueError(f"{given[0]} does not go with {suite}, whose own program scores it; leave it out")
    run_public(suite, prompts, out, pictures, batch_size, flags)


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
    from unidiff.evaluation.suites.base import SUITES, asked_rows, run_benchmark

    found = SUITES.get_or_refuse(suite, "the benchmark")
    asked_rows(found, prompts, out, pictures)  # mistakes show before a model is loaded
    with shared_rows(flags, batch_size) as (pipe, options):
        folder = run_benchmark(found, pipe, prompts, out, pictures, **options)
    if folder is not None:
        typer.echo(f"{folder}: for {found.scorer}")


@eval_app.command("compare")
def compare(
    before: Annotated[Path, typer.Argument(help="An evaluation: its folder (--out), or its JSON with --outcomes.")],
    after: Annotated[Path, typer.Argument(help="Another one of the same cases.")],
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the differences to this file.")] = None,
) -> None:
    """Difference of two evaluations of the same cases, with paired bootstrap intervals."""
    files = _json_of(before), _json_of(after)
    check_outputs(json_file=json_path, inputs=files)
    from unidiff.evaluation.paired import compare_reports
    from unidiff.evaluation.report import EvaluationReport

    first, second = (EvaluationReport.load(file) for file in files)
    found = compare_reports(first, second)
    if json_path is not None:
        found.save(json_path)
    console().print(found.table(f"{after} - {before}"))


def _json_of(evaluation: Path) -> Path:
    """The JSON of an evaluation that is named by its folder, or by the file itself."""
    return evaluation / "report.json" if evaluation.is_dir() else evaluation
