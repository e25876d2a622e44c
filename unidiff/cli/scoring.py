"""`unidiff eval score`: a metric of pictures, captions or answers in files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from unidiff.cli.common import Device, Seed, bar, check_outputs, console, quiet_libraries
from unidiff.process import pick_device


def score(
    metric: Annotated[
        str,
        typer.Argument(help="fid, kid, is, clipscore, cider, bleu, vqa, gqa, pope, mme, mmbench, mmmu, perplexity."),
    ],
    made: Annotated[
        Path, typer.Argument(help="What a model made: a folder of pictures, a file of captions or answers.")
    ],
    against: Annotated[
        Path | None, typer.Option(help="What it is compared with: pictures, captions or annotations.")
    ] = None,
    network: Annotated[
        str | None,
        typer.Option(help="Weights or folder of the network that looks at it, or one of its own name (emoji)."),
    ] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all numbers to this file.")] = None,
    outcomes: Annotated[
        bool, typer.Option("--outcomes", help="Keep the score of every case in the JSON, for comparisons.")
    ] = False,
    resamples: Annotated[
        int | None, typer.Option(min=2, max=10**7, help="Of the bootstrap; default: the metric's own number.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, max=10**5, help="Pictures or texts at once.")] = 32,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Score pictures, captions or answers in files, each number with its interval; folders of `eval run` are read too."""
    check_outputs(json_file=json_path, inputs=[path for path in (made, against) if path is not None])
    if outcomes and json_path is None:
        raise ValueError("--outcomes goes with --json, which names the file to keep them in")
    from unidiff.evaluation.scoring import score_results

    quiet_libraries()
    options: dict[str, Any] = {"seed": seed, "resamples": resamples, "batch_size": batch_size}
    options["device"] = str(pick_device(device))
    with bar(metric) as tick:
        report = score_results(metric, made, against, network, **options, tick=tick)
    if json_path is not None:
        report.save(json_path, outcomes)
    console().print(report.table(f"{metric} of {made}"))
    for note in report.about["notes"]:
        typer.echo(note, err=True)
