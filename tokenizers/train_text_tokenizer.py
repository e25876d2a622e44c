"""Train a byte-level BPE text tokenizer: `python tokenizers/train_text_tokenizer.py OUT --text captions.txt --shards 'data/{0..9}.tar'`.

Every source may be given several times. Text files are read line by line; shards contribute their `key.txt` members.
A YAML file may hold the same settings: `--config tokenizer.yaml`, with keys text, shards, vocab_size, specials, limit.
Another tokenizer in OUT is never replaced.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unidiff.config import load_config
from unidiff.errors import check_regular, exit_status, reading, writing
from unidiff.schema import check_fields

if TYPE_CHECKING:
    from unidiff.tokens.text import TextTokenizer


@dataclass(frozen=True)
class TextTokenizerConfig:
    """Settings of a run.

    Args:
        limit: largest number of documents read; 0 reads all.
        allow_missing: shards that do not exist are counted in place of refused.
    """

    text: list[str] = field(default_factory=list)
    shards: list[str] = field(default_factory=list)
    vocab_size: int = 8192
    specials: list[str] = field(default_factory=lambda: ["eos", "caption", "question", "answer"])
    limit: int = 0
    allow_missing: bool = False

    def __post_init__(self) -> None:
        check_fields(self, "")
        if self.limit < 0:
            raise ValueError(f"limit = {self.limit} must be at least 0, which reads all")
        if self.vocab_size > 2**24:
            raise ValueError(f"vocab_size = {self.vocab_size} must be at most {2**24}")


def documents(config: TextTokenizerConfig) -> Iterator[str]:
    """All texts, in order, up to the limit."""
    yield from islice(_all_documents(config), config.limit or None)


def _all_documents(config: TextTokenizerConfig) -> Iterator[str]:
    for name in config.text:
        yield from _lines(name)
    if config.shards:
        from unidiff.data.rows import qa_pairs
        from unidiff.data.shards import ShardSource

        source = ShardSource(config.shards, require=("txt",), optional=("json",), allow_missing=config.allow_missing)
        for sample in source:
            yield sample["txt"]
            yield from (part for pair in qa_pairs(sample.get("json"))[0] for part in pair)


def _lines(name: str) -> Iterator[str]:
    def read(file) -> str:
        with reading(name, "a text file", "it is not UTF-8; convert it, for instance with iconv"):
            return file.readline()

    with open(name, encoding="utf-8-sig", newline="") as file:
        while line := read(file):
            if line.strip():
                yield line.rstrip("\r\n")


def main(
    out: Annotated[Path, typer.Argument(help="folder to write the tokenizer to")],
    config: Annotated[Path | None, typer.Option(help="YAML file with the same settings")] = None,
    text: Annotated[list[str] | None, typer.Option(help="UTF-8 text file, one document per line")] = None,
    shards: Annotated[list[str] | None, typer.Option(help="tar shards: path, brace pattern or URL")] = None,
    vocab_size: Annotated[int | None, typer.Option(help="largest number of ids, bytes and specials included")] = None,
    limit: Annotated[int | None, typer.Option(help="read at most this many documents")] = None,
    allow_missing: Annotated[
        bool | None, typer.Option("--allow-missing", help="count shards that do not exist in place of refusing them")
    ] = None,
) -> None:
    """Train a byte-level BPE and save it as a Hugging Face tokenizer."""

    def run() -> None:
        given = {"text": text, "shards": shards, "vocab_size": vocab_size, "limit": limit}
        given |= {"allow_missing": allow_missing}
        settings = replace(
            load_config(TextTokenizerConfig, config), **{k: v for k, v in given.items() if v is not None}
        )
        if not settings.text and not settings.shards:
            raise ValueError("no corpus: give --text FILE or --shards PATTERN, or name them in --config")
        for name in settings.text:
            if not Path(name).exists():
                raise FileNotFoundError(f"text file {name!r} does not exist")
            check_regular(name)
        if out.exists() and not out.is_dir():
            raise ValueError(f"{str(out)!r} is a file; name a folder to save the tokenizer in")
        from unidiff.tokens.text import TextTokenizer

        tokenizer = TextTokenizer.train(documents(settings), settings.vocab_size, settings.specials)
        _refuse_another(tokenizer, out)
        tokenizer.save_pretrained(out)
        typer.echo(f"{tokenizer.size} ids, specials {tokenizer.specials()}, written to {out}")

    raise typer.Exit(exit_status(run))


def _refuse_another(tokenizer: TextTokenizer, out: Path) -> None:
    """Raise ValueError where saving would replace files that are not the same."""
    with tempfile.TemporaryDirectory() as folder:
        with writing(f"{tempfile.gettempdir()} (where the tokenizer is compared with what is there)", Path(folder)):
            tokenizer.save_pretrained(folder)
        names = sorted(path.name for path in Path(folder).iterdir())
        others = [
            name
            for name in names
            if (out / name).exists() and (out / name).read_bytes() != (Path(folder) / name).read_bytes()
        ]
    if others:
        raise ValueError(
            f"{str(out)!r} already holds another tokenizer ({', '.join(others)}), which would be lost; remove it, or name "
            "another folder"
        )


if __name__ == "__main__":
    typer.run(main)
