"""Train a byte-level BPE text tokenizer: `python tokenizers/train_text_tokenizer.py OUT --text captions.txt --shards 'data/{0..9}.tar'`.

Every source may be given several times. Text files are read line by line; shards contribute their `key.txt` members.
A YAML file may hold the same settings: `--config tokenizer.yaml`, with keys text, shards, vocab_size, specials, limit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Annotated

import typer

from unidiff.config import load_config


@dataclass(frozen=True)
class TextTokenizerConfig:
    """Settings of a run. `limit` is the largest number of documents read; 0 reads all."""

    text: list[str] = field(default_factory=list)
    shards: list[str] = field(default_factory=list)
    vocab_size: int = 8192
    specials: list[str] = field(default_factory=lambda: ["eos", "caption", "question", "answer"])
    limit: int = 0


def documents(config: TextTokenizerConfig) -> Iterator[str]:
    """All texts, in order, up to the limit."""
    yield from islice(_all_documents(config), config.limit or None)


def _all_documents(config: TextTokenizerConfig) -> Iterator[str]:
    for name in config.text:
        with open(name, encoding="utf-8", newline="") as file:
            for line in file:
                if line.strip():
                    yield line.rstrip("\r\n")
    if config.shards:
        from unidiff.data.collate import qa_pairs
        from unidiff.data.shards import ShardSource

        source = ShardSource(config.shards, require=("txt",), optional=("json",))
        for sample in source:
            yield sample["txt"]
            yield from (part for pair in qa_pairs(sample.get("json")) for part in pair)


def main(
    out: Annotated[Path, typer.Argument(help="folder to write the tokenizer to")],
    config: Annotated[Path | None, typer.Option(help="YAML file with the same settings")] = None,
    text: Annotated[list[str] | None, typer.Option(help="UTF-8 text file, one document per line")] = None,
    shards: Annotated[list[str] | None, typer.Option(help="tar shards: path, brace pattern or URL")] = None,
    vocab_size: Annotated[int | None, typer.Option(help="largest number of ids, bytes and specials included")] = None,
    limit: Annotated[int | None, typer.Option(help="read at most this many documents")] = None,
) -> None:
    """Train a byte-level BPE and save it as a Hugging Face tokenizer."""
    try:
        settings = load_config(TextTokenizerConfig, config)
        given = {"text": text, "shards": shards, "vocab_size": vocab_size, "limit": limit}
        settings = replace(settings, **{k: v for k, v in given.items() if v is not None})
        if not settings.text and not settings.shards:
            raise ValueError("no corpus: give --text FILE or --shards PATTERN, or name them in --config")
        if missing := [name for name in settings.text if not Path(name).is_file()]:
            raise FileNotFoundError(f"text file {missing[0]!r} does not exist")
        from unidiff.tokens.text import TextTokenizer

        tokenizer = TextTokenizer.train(documents(settings), settings.vocab_size, settings.specials)
        tokenizer.save_pretrained(out)
    except UnicodeDecodeError as error:
        raise _fail(f"a text file is not UTF-8: {error.reason} at byte {error.start}") from error
    except (ValueError, OSError) as error:
        raise _fail(str(error)) from error
    typer.echo(f"{tokenizer.size} ids, specials {tokenizer.specials()}, written to {out}")


def _fail(message: str) -> typer.Exit:
    typer.echo(f"error: {message}", err=True)
    return typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
