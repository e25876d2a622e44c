"""Pre-tokenise webdataset shards (`key.jpg|png|webp|gif|bmp`, `key.txt`, optional `key.json`) for training:

    python tokenizers/encode_shards.py OUT --shards 'data/{00000..00127}.tar' --image-tokenizer DIR --text-tokenizer DIR

Question / answer pairs come from `key.json`: {"qa": [["what is it?", "a cat"], ...]}. The same command continues a run
that was stopped. OUT can then be named as `data.train` in a training config.

With --documents, samples are interleaved documents of up to --text-length tokens: `key.json` is
{"texts": ["...", null, "..."], "images": [null, "0.jpg", null]}, and the pictures are `key.0.jpg` and so on; text alone
is fine. OUT is then named as `data.documents`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from unidiff.errors import exit_status


def main(
    out: Annotated[Path, typer.Argument(help="folder for the token shards")],
    shards: Annotated[list[str], typer.Option(help="raw shards: path, folder, brace pattern or URL; may be repeated")],
    image_tokenizer: Annotated[str, typer.Option(help="folder of the image tokenizer")],
    text_tokenizer: Annotated[str, typer.Option(help="folder or hub name of the text tokenizer")],
    image_size: Annotated[int, typer.Option(help="side of the square pictures")] = 256,
    text_length: Annotated[
        int, typer.Option(help="tokens of the text span, task token and EOS included; of whole documents")
    ] = 64,
    batch_size: Annotated[int, typer.Option(help="images per encoder call")] = 32,
    samples_per_shard: Annotated[int, typer.Option(help="samples per written tar")] = 1000,
    workers: Annotated[int, typer.Option(help="decoding threads")] = 2,
    documents: Annotated[bool, typer.Option("--documents", help="interleaved documents in place of pairs")] = False,
    allow_missing: Annotated[
        bool, typer.Option("--allow-missing", help="count raw shards that do not exist in place of refusing them")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1")] = "cpu",
) -> None:
    """Encode shards into codes.npy and text.npy members, skipping and listing what is damaged."""

    def run() -> None:
        from unidiff.data.sources import expand_shards

        expand_shards(shards, allow_missing)  # a mistyped or refused source fails before the slow imports
        from unidiff.data.encode import EncodeSettings, encode_shards
        from unidiff.process import pick_device
        from unidiff.tokens.image.vq import VQImageTokenizer
        from unidiff.tokens.text import TextTokenizer

        settings = EncodeSettings(image_size, text_length, batch_size, samples_per_shard, workers, documents)
        place = pick_device(device)
        manifest = encode_shards(
            shards,
            VQImageTokenizer.from_pretrained(image_tokenizer).to(place),
            TextTokenizer.from_pretrained(text_tokenizer),
            out,
            settings,
            on_shard=lambda count, report: typer.echo(f"{count} samples, {report.total} skipped"),
            allow_missing=allow_missing,
        )
        _say(manifest, out)

    raise typer.Exit(exit_status(run))


def _say(manifest, out: Path) -> None:
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


if __name__ == "__main__":
    typer.run(main)
