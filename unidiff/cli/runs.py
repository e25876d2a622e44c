"""The commands about runs: the settings that come with the package, and what runs have come to."""

from __future__ import annotations

import json
import shutil
import time
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import typer

from unidiff.cli.common import check_files, console
from unidiff.config import CONFIGS, named_config
from unidiff.files import check_writable, replacing

configs_app = typer.Typer(name="configs", help="The settings that come with unidiff.", no_args_is_help=True)


@configs_app.command("list")
def list_configs() -> None:
    """Name them, with the first line of what each says of itself."""
    for path in sorted(CONFIGS.glob("*.yaml")):
        first = path.read_text(encoding="utf-8").partition("\n")[0]
        typer.echo(f"{path.stem:22}{first.removeprefix('#').strip()}")


@configs_app.command()
def copy(
    name: Annotated[str, typer.Argument(help="One of `unidiff configs list`.")],
    out: Annotated[Path | None, typer.Argument(help="File or folder to write; default: the working folder.")] = None,
) -> None:
    """Copy one, to change it; a file that is there is never replaced."""
    source = named_config(name)
    target = out or Path()
    target = target / source.name if target.is_dir() else target
    check_writable(target)
    if target.exists():
        raise ValueError(f"{str(target)!r} is there already; name another file")
    with replacing(target) as temporary:
        shutil.copyfile(source, temporary)
    typer.echo(target)


def runs(
    folders: Annotated[list[Path], typer.Argument(help="Folders of runs, or folders that hold some.")],
    html: Annotated[Path | None, typer.Option(help="Write their curves on one page, self-contained.")] = None,
) -> None:
    """List runs, the latest last, and the settings in which they differ."""
    if html is not None and html.suffix != ".html":
        raise ValueError(f"output {str(html)!r} (--html) must end in .html")
    check_files([] if html is None else [("--html", html)])
    from rich.table import Column, Table

    from unidiff.train.run.report import differing, find_runs, write_comparison

    found = find_runs(folders)
    others = [Column(name, no_wrap=True) for name in ("steps", "of", "time", "loss", "best", "last written")]
    table = Table(Column("run", overflow="fold"), *others, box=None, pad_edge=False)
    for number, run in enumerate(found, 1):
        loss = run.series.get(("train", "loss"), [(0, float("nan"))])[-1][1]
        best = run.best()
        written = "goes on" if run.goes else time.strftime("%Y-%m-%d %H:%M", time.localtime(run.last))
        spent = str(timedelta(seconds=int(run.last - run.first)))
        said = "" if best is None else f"{best[0]} {best[1]:.4g}"
        table.add_row(
            f"{number} {run.folder}",
            str(run.step),
            str(run.settings.get("steps", "")),
            spent,
            f"{loss:.4g}",
            said,
            written,
        )
    shown = console()
    shown.print(table)
    if len(found) > 1 and (different := differing(found)):
        table = Table("setting", *map(str, range(1, len(found) + 1)), box=None, pad_edge=False)
        for name, values in different.items():
            table.add_row(name, *("" if value is None else json.dumps(value)[:40] for value in values))
        shown.print()
        shown.print(table)
    if html is not None:
        typer.echo(write_comparison(found, html))
