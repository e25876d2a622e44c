"""The commands between a person's pictures and a run: tokenizers and tokens. Torch is imported inside."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unidiff.cli.common import Device, bar, check_outputs, height_and_width
from unidiff.cli.training import Config, Settings
from unidiff.config import load_config
from unidiff.mirror import local_folder, local_model
from unidiff.process import pick_device, set_up_process

if TYPE_CHECKING:
    from unidiff.data.manifest import TokenManifest

tokenizer_app = typer.Typer(name="tokenizer", help="Train a tokenizer, of pictures or of texts.", no_args_is_help=True)
data_app = typer.Typer(name="data", help="Look at data.", no_args_is_help=True)
Shards = Annotated[list[str] | None, typer.Option(help="Raw shards: path, folder, brace pattern or URL; repeatable.")]
AllowMissing = Annotated[
    bool, typer.Option("--allow-missing", help="Count shards that do not exist in place of refusing them.")
]


@tokenizer_app.command()
def image(config: Config, settings: Settings = None) -> None:
    """Train an image tokenizer.

    Writes into `out`: `model`, which `VQImageTokenizer.from_pretrained` loads, `report.json` (PSNR, SSIM, code usage on
    pictures that were not trained on), `reconstructions.png` (pictures above, their reconstructions below),
    `report.html`, `metrics.jsonl`, `samples` and `checkpoints`. The same command continues a run that was stopped or killed, bit for bit. The model
    with the best PSNR is kept. Works under torchrun, each process with a part of every batch.
    """
    set_up_process(os.environ)
    from unidiff.train.image_tokenizer.config import ImageTokenizerConfig

    run = load_config(ImageTokenizerConfig, config, settings or [])
    from unidiff.train.image_tokenizer.trainer import train_image_tokenizer

    with local_folder(run.out) as place:
        train_image_tokenizer(replace(run, out=str(place)), os.environ)


@tokenizer_app.command()
def text(
    out: Annotated[Path, typer.Argument(help="Folder to write the tokenizer to.")],
    config: Annotated[str | None, typer.Option(help="YAML file with the same settings.")] = None,
    text: Annotated[list[str] | None, typer.Option(help="UTF-8 text file, one document per line; repeatable.")] = None,
    shards: Shards = None,
    vocab_size: Annotated[
        int | None, typer.Option(help="Largest number of ids, bytes and specials included; 8192 if nothing is said.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Read at most this many documents.")] = None,
    allow_missing: AllowMissing = False,
) -> None:
    """Train a byte-level BPE and save it as a Hugging Face tokenizer.

    Text files are read line by line; shards give their `key.txt` and questions. A YAML file may hold the same settings:
    text, shards, vocab_size, specials, limit. Another tokenizer in OUT is never replaced.
    """
    from unidiff.train.text_tokenizer import TextTokenizerConfig, train_text_tokenizer

    given = {"text": text, "shards": shards, "vocab_size": vocab_size, "limit": limit}
    given |= {"allow_missing": allow_missing or None}
    asked: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    tokenizer = train_text_tokenizer(replace(load_config(TextTokenizerConfig, config), **asked), out)
    typer.echo(f"{tokenizer.size} ids, specials {tokenizer.specials()}, written to {out}")


def shards(
    source: Annotated[str, typer.Argument(help="Folder of pictures, CSV, TSV, JSONL or parquet file.")],
    out: Annotated[str, typer.Argument(help="Folder for the shards, here or in a store (s3://, gs://, ...).")],
    size: Annotated[
        str | None, typer.Option(help="Side in pixels, or WIDTHxHEIGHT; left out, each keeps its own.")
    ] = None,
    fit: Annotated[
        str, typer.Option(help="Other proportions: `crop` to the centre, `pad` with --background, `stretch`.")
    ] = "crop",
    background: Annotated[
        str, typer.Option(help="Colour under transparent pixels and of edges, as white or #ffcc00.")
    ] = "white",
    picture_column: Annotated[
        str, typer.Option(help="Of a table: paths, addresses or bytes. Left out: image, file_name, path, ...")
    ] = "",
    caption_column: Annotated[str, typer.Option(help="Of a table. Left out: caption, text, ...")] = "",
    first_line: Annotated[bool, typer.Option("--first-line", help="Of a text is the caption.")] = False,
    form: Annotated[str, typer.Option("--format", help="Of the written pictures: png, jpg or webp (lossless).")] = (
        "png"
    ),
    samples_per_shard: Annotated[int, typer.Option(help="Samples per written tar.")] = 1000,
    workers: Annotated[int, typer.Option(help="Threads that read and resize.")] = 2,
    seed: Annotated[int, typer.Option(help="Of the order of the samples; those of parquet files keep theirs.")] = 0,
) -> None:
    """Make shards of pictures and captions, upright and of one size, and say what was left out and why.

    SOURCE is a folder of pictures with .txt files of the same names; one with a metadata.csv, .jsonl or .parquet (Hugging
    Face's imagefolder); one of parquet files; or a CSV, TSV, JSONL or parquet file with a column of pictures and one of
    texts. `shards.json` in OUT says the size, which training then knows.
    """
    sides = None if size is None else height_and_width(size, "--size")
    from unidiff.data.collect import ShardSettings, make_shards
    from unidiff.data.report import SkipReport

    columns = {"picture_column": picture_column, "caption_column": caption_column, "first_line": first_line}
    options: dict[str, Any] = {"form": form, "samples_per_shard": samples_per_shard, "workers": workers, "seed": seed}
    settings = ShardSettings(sides, fit, background, **columns, **options)  # type: ignore[arg-type]
    with local_folder(out) as place, bar("shards") as advance:
        note = make_shards(source, place, settings, advance)
    typer.echo(f"{note.samples} samples in {len(note.shards)} shards: {out}")
    typer.echo(SkipReport.from_state_dict(note.skipped).summary())


@data_app.command()
def check(
    shards: Annotated[list[str], typer.Argument(help="Raw shards: path, folder, brace pattern or URL.")],
    text_tokenizer: Annotated[
        str | None, typer.Option(help="Folder or hub name: count tokens and words that it does not know.")
    ] = None,
    sheet: Annotated[Path | None, typer.Option(help="Write the first pictures with their captions to this file.")] = (
        None
    ),
    most: Annotated[int | None, typer.Option(min=1, help="Look at no more samples than this.")] = None,
) -> None:
    """Say what shards hold: samples, sizes, lengths of captions, unknown words, and what cannot be used."""
    check_outputs(out=sheet)
    from unidiff.pipelines.sheet import save_image
    from unidiff.tokens.text import TextTokenizer
    from unidiff.train.data.check import check_shards

    texts = None if text_tokenizer is None else TextTokenizer.from_pretrained(text_tokenizer)
    with bar("samples") as advance:
        found = check_shards(shards, texts, most, lambda: advance(1, most))
    for line in found.lines():
        typer.echo(line)
    if sheet is not None and found.shown:
        save_image(found.sheet(), sheet)
        typer.echo(sheet)


def encode(
    out: Annotated[str, typer.Argument(help="Folder for the token shards, here or in a store (s3://, gs://, ...).")],
    shards: Annotated[list[str], typer.Option(help="Raw shards: path, folder, brace pattern or URL; repeatable.")],
    image_tokenizer: Annotated[str, typer.Option(help="Folder of the image tokenizer.")],
    text_tokenizer: Annotated[str, typer.Option(help="Folder or hub name of the text tokenizer.")],
    image_size: Annotated[
        str | None,
        typer.Option(help="Side in pixels, or WIDTHxHEIGHT; left out: as `unidiff shards` made them, else 256."),
    ] = None,
    text_length: Annotated[
        int | None,
        typer.Option(
            help="Tokens of the text span, task token and EOS included; of whole documents. Left out: what the first "
            "10,000 samples need, at most 256."
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Images per encoder call.")] = 32,
    samples_per_shard: Annotated[int, typer.Option(help="Samples per written tar.")] = 1000,
    workers: Annotated[int, typer.Option(help="Decoding threads.")] = 2,
    documents: Annotated[bool, typer.Option("--documents", help="Interleaved documents in place of pairs.")] = False,
    allow_missing: AllowMissing = False,
    device: Device = "cpu",
) -> None:
    """Turn shards of pictures and captions into token shards, skipping and listing what is damaged.

    A sample is `key.jpg|png|webp|gif|bmp`, `key.txt` and optionally `key.json`, whose questions and answers are
    {"qa": [["what is it?", "a cat"], ...]}. The same command continues a run that was stopped. OUT can then be named as
    `data.train` in a training config.

    With --documents, samples are interleaved documents of up to --text-length tokens: `key.json` is
    {"texts": ["...", null, "..."], "images": [null, "0.jpg", null]}, and the pictures are `key.0.jpg` and so on; text
    alone is fine. OUT is then named as `data.documents`.
    """
    sides = None if image_size is None else height_and_width(image_size, "--image-size")
    from unidiff.data.sources import expand_shards

    urls = expand_shards(shards, allow_missing)  # a mistyped or refused source fails before the slow imports
    from unidiff.data.collect import noted, size_of
    from unidiff.data.encode import EncodeSettings, encode_shards, fitting_text_length
    from unidiff.tokens.image.vq import VQImageTokenizer
    from unidiff.tokens.text import TextTokenizer

    note = noted(urls)
    height, width = sides or size_of(urls)
    settings = EncodeSettings(
        height, 64 if text_length is None else text_length, batch_size, samples_per_shard, workers, documents,
        image_width=0 if width == height else width,
    )  # fmt: skip
    images = VQImageTokenizer.from_pretrained(local_model(image_tokenizer)).to(pick_device(device))
    texts = TextTokenizer.from_pretrained(local_model(text_tokenizer))
    if text_length is None and not documents:
        settings = replace(settings, text_length=fitting_text_length(urls, texts))
        typer.echo(f"text length {settings.text_length} tokens, as the captions need", err=True)
    total = note.samples if note is not None else None
    with local_folder(out) as place, bar("encode") as advance:
        manifest = encode_shards(
            shards,
            images,
            texts,
            place,
            settings,
            on_shard=lambda count, report: typer.echo(f"{count} samples, {report.total} skipped"),
            allow_missing=allow_missing,
            on_batch=lambda count: advance(count, total),
            tokenizers={"image": _place(image_tokenizer), "text": _place(text_tokenizer)},
        )
    _say(manifest, out)


def _place(name: str) -> str:
    """A folder by its whole path, a hub name as it is."""
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def _say(manifest: TokenManifest, out: str) -> None:
    from unidiff.data.report import SkipReport

    documents, length = manifest.kind == "documents", manifest.text_length
    what = "documents" if documents else f"samples, {manifest.questions} questions"
    typer.echo(f"{manifest.samples} {what} in {len(manifest.shards)} shards: {out}")
    typer.echo(SkipReport.from_state_dict(manifest.skipped).summary() if manifest.skipped else "nothing was skipped")
    if documents and manifest.cut_captions:
        typer.echo(f"{manifest.cut_captions} documents were cut: longer than {length} tokens")
    elif manifest.cut_captions or manifest.long_questions:
        typer.echo(
            f"{manifest.cut_captions} captions were cut and {manifest.long_questions} questions left out: "
            f"longer than {length} tokens"
        )
    if manifest.bad_questions:
        typer.echo(f"{manifest.bad_questions} entries of qa were left out: no pair of a question and an answer")
