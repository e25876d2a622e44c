"""The commands about runs: the settings that come with the package."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

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
