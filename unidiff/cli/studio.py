"""`unidiff studio`: the page on which people use a model. Torch and gradio are imported inside."""

from __future__ import annotations

from typing import Annotated

import typer

from unidiff.cli.common import Device, Dtype, load_pipeline
from unidiff.world import WORLDS


def studio(
    model: Annotated[
        str, typer.Argument(help="Model folder, hub model owner/name, or the embedded 'emoji' or 'faces'.")
    ] = "emoji",
    host: Annotated[
        str, typer.Option(help="Address to serve at; another one than 127.0.0.1 may open the page to your network.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 7860,
    share: Annotated[
        bool, typer.Option("--share", help="Open the page to everyone, through a tunnel of gradio's.")
    ] = False,
    world: Annotated[
        str | None, typer.Option(help="Whose examples to show; default: those of the embedded model.")
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "float32",
) -> None:
    """Open a page to draw, describe, ask, complete and chat, and to watch the tokens appear."""
    from unidiff.studio.app import build, check_port, launch_options
    from unidiff.studio.session import Studio

    check_port(host, port)
    if world is not None or model in WORLDS:
        shown = WORLDS.get_or_refuse(model if world is None else world, "--world")
    else:
        shown = None
    pipe = load_pipeline(model, device, dtype)
    pipe.set_progress_bar_config(disable=True)
    place = str(pipe.device)
    rooms = Studio(pipe, model, "" if place == "cpu" else place)
    page = build(rooms, () if shown is None else shown.examples(pipe))
    if share:
        _warn("--share: everyone who has the address can use this page and its computer, without a password")
    if host not in ("127.0.0.1", "localhost", "::1"):
        _warn(f"--host {host}: whoever reaches this computer can use the page, without a password")
    try:
        page.launch(**launch_options(host, port, share))
    finally:
        rooms.worker.close()


def _warn(words: str) -> None:
    typer.echo(f"unidiff: warning: {words}", err=True)
