"""`unidiff fashion`: what is special to Fashion-MNIST. Torch is imported inside."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from unidiff.cli.common import Device, Dtype, Seed, bar, check_folder, console, load_own_model

fashion_app = typer.Typer(
    name="fashion",
    help="Real photographs: Fashion-MNIST as a folder with captions, and a model of it measured (docs/photographs.md).",
    no_args_is_help=True,
)
Source = Annotated[Path, typer.Option(help="Folder of the IDX files, plain or .gz; Debian: dataset-fashion-mnist.")]
SOURCE = Path("/usr/share/datasets/fashion-mnist")  # where Debian's package puts them


@fashion_app.command()
def pictures(
    out: Annotated[Path, typer.Argument(help="Folder to make, for `unidiff shards`.")],
    source: Source = SOURCE,
    split: Annotated[str, typer.Option(help="train or test.")] = "train",
    captions: Annotated[int, typer.Option(min=1, max=1000, help="Sentences about each picture, at most.")] = 1,
    seed: Annotated[int, typer.Option(help="Of the captions.")] = 0,
) -> None:
    """Write the photographs as PNG files with a table of captions, and prompts.txt, the captions alone."""
    from unidiff.recipes.fashion.folder import write_folder

    with bar("pictures") as tick:
        count = write_folder(source, split, out, captions, seed, tick)
    typer.echo(f"{count} captions -> {out}")


@fashion_app.command()
def measure(
    model: Annotated[str, typer.Argument(help="Folder of the pipeline.")],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for report.json, numbers.csv and sheets; run again, it goes on.")
    ],
    source: Source = SOURCE,
    drawn: Annotated[Path | None, typer.Option(help="Folder of `unidiff generate --prompts TEST/prompts.txt`.")] = None,
    said: Annotated[
        Path | None, typer.Option(help="Folder of `unidiff generate --prompts TEST/pictures.jsonl`.")
    ] = None,
    part: Annotated[
        list[str] | None, typer.Option(help="Only this part; repeatable. An unknown one lists all.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Take the first test pictures only.")] = None,
    samples: Annotated[int, typer.Option(min=1, max=10**4, help="Masks for each row of a likelihood.")] = 2,
    classifier_steps: Annotated[
        int, typer.Option(min=1, max=10**7, help="Steps of 128 pictures of a classifier.")
    ] = 1500,
    batch_size: Annotated[int, typer.Option(min=1, max=10**5, help="Rows at once; results do not depend on it.")] = 64,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "float32",
) -> None:
    """Measure a model on the test photographs: tokenizer, likelihoods, captions, drawn pictures, copies."""
    from unidiff.evaluation.report_page import FILES

    check_folder(out, FILES)
    pipe = load_own_model(model, device, dtype, "fashion measure")
    from unidiff.evaluation.benchmark.measure import model_hash
    from unidiff.evaluation.kept import KeptRows
    from unidiff.evaluation.report_page import write_files
    from unidiff.evaluation.suites.base import RESULTS
    from unidiff.files import locked
    from unidiff.recipes.fashion.measure import FashionMeasures, measured, save_sheets

    options = {"limit": limit, "samples": samples, "classifier_steps": classifier_steps, "seed": seed}
    about = {"model": model, "model_hash": model_hash(pipe), "dtype": dtype, **options}
    with locked(out, "evaluation"), bar("fashion") as tick:
        found = FashionMeasures(pipe, source, drawn, said, batch_size=batch_size, folder=out, tick=tick, **options)  # type: ignore[arg-type]
        report = measured(found, part or (), KeptRows(out / RESULTS, about, pipe.device))
        report.about |= about
        write_files(report, out, f"Fashion-MNIST: {model}")
        save_sheets(found, out)
    console().print(report.table(f"fashion: {model}"))
