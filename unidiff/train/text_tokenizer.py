"""Training a byte-level BPE on text files (a document a line) and on the `key.txt` and questions of shards."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from unidiff.data.rows import qa_pairs
from unidiff.data.shards import ShardSource
from unidiff.errors import check_regular, reading, writing
from unidiff.schema import check_fields
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


def train_text_tokenizer(config: TextTokenizerConfig, out: Path) -> TextTokenizer:
    """Train a byte-level BPE and save it in `out` as a Hugging Face tokenizer.

    Raises:
        FileNotFoundError: a text or shard that does not exist.
        ValueError: no corpus, a text that is not UTF-8, or an `out` that holds another tokenizer.
    """
    if not config.text and not config.shards:
        raise ValueError("no corpus: give --text FILE or --shards PATTERN, or name them in --config")
    for name in config.text:
        if not Path(name).exists():
            raise FileNotFoundError(f"text file {name!r} does not exist")
        check_regular(name)
    if out.exists() and not out.is_dir():
        raise ValueError(f"{str(out)!r} is a file; name a folder to save the tokenizer in")
    tokenizer = TextTokenizer.train(documents(config), config.vocab_size, config.specials)
    _refuse_another(tokenizer, out)
    tokenizer.save_pretrained(out)
    return tokenizer


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
