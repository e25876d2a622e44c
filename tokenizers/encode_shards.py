"""Pre-tokenise webdataset shards (`key.jpg|png|webp`, `key.txt`, optional `key.json`) for training:

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
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
) -> None:
    """Encode shards into codes.npy and text.npy members, skipping and listing what is damaged."""
    try:
        from unidiff.data.tar import expand_shards

        expand_shards(shards)  # a mistyped or refused source fails before the slow imports
        from unidiff.data.encode import EncodeSettings, encode_shards
        from unidiff.data.report import SkipReport
        from unidiff.tokens.image_vq import VQImageTokenizer
        from unidiff.tokens.text import TextTokenizer

        settings = EncodeSettings(image_size, text_length, batch_size, samples_per_shard, workers, documents)
        manifest = encode_shards(
            shards,
            VQImageTokenizer.from_pretrained(image_tokenizer).to(device),
            TextTokenizer.from_pretrained(text_tokenizer),
            out,
            settings,
            on_shard=lambda count, report: typer.echo(f"{count} samples, {report.total} skipped"),
        )
    except (ValueError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    report = SkipReport.from_state_dict(manifest.skipped)
    what = "documents" if documents else f"samples, {manifest.questions} questions"
    typer.echo(f"{manifest.samples} {what} in {len(manifest.shards)} shards: {out}")
    typer.echo(report.summary())
    if documents and manifest.cut_captions:
        typer.echo(f"{manifest.cut_captions} documents were cut: longer than {text_length} tokens")
    elif manifest.cut_captions or manifest.long_questions:
        typer.echo(
            f"{manifest.cut_captions} captions were cut and {manifest.long_questions} questions left out: "
            f"longer than {text_length} tokens"
        )


if __name__ == "__main__":
    typer.run(main)
