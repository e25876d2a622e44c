"""From `DataConfig` to the token sources of a run, and `DataLosses`: what of them could not be used."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

from unidiff.addresses import is_remote
from unidiff.data.collect import size_of
from unidiff.data.encode import EncodeSettings
from unidiff.data.manifest import TokenManifest
from unidiff.data.report import Skip, SkipReport
from unidiff.data.sources import expand_shards, parse_sources
from unidiff.data.token_set import folder_of, is_tokenised, token_shards
from unidiff.errors import read_json
from unidiff.families.family import named_vocabulary
from unidiff.files import replace_text
from unidiff.schema import check_value
from unidiff.tokens.image.vq import VQImageTokenizer
from unidiff.tokens.text import TextTokenizer
from unidiff.train.config import TrainConfig
from unidiff.train.data.shard_source import DocumentTokens, ShardTokens, WeightedShards, open_shards
from unidiff.train.data.source import TokenSource, TokenTable
from unidiff.train.run.distributed import Parallel

_LOG = logging.getLogger(__name__)
SKIPPED = "skipped.json"


def open_sources(config: TrainConfig) -> tuple[TokenTable | ShardTokens, TokenTable | ShardTokens | None]:
    """The training source and the held-out one (None when `validation_rows` is 0 and no file is named).

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: nothing is configured, the two disagree, or too few rows are left for training.
    """
    data = config.data
    if not data.train:
        raise ValueError("data.train is empty; name a token table (.safetensors) or shards")
    if data.validation and (shared := _files(data.validation) & _files(data.train)):
        raise _trained_on(data.validation, sorted(shared)[0])
    table = _open(data.train, config, "train")
    check_declared(config, table)
    held_out: TokenTable | ShardTokens | None = None
    if data.validation:
        held_out = _open(data.validation, config, "validation")
        if held_out.vocabulary != table.vocabulary or held_out.grid != table.grid:
            raise ValueError(f"{data.validation!r} has another vocabulary or grid than {data.train!r}")
        if held_out.contents() & table.contents():  # copies
            raise _trained_on(data.validation, "the same content under another name")
    elif data.validation_rows:
        if data.validation_rows >= table.rows:
            raise ValueError(
                f"data.validation_rows = {data.validation_rows} leaves nothing of {table.rows} rows to train on"
            )
        table, held_out = table.split(data.validation_rows)
    return table.seeded(config.seed, phases(config)), held_out


def noted_tokenizers(spec: str) -> dict[str, str]:
    """Where the tokenizers of token shards are, as their manifests say; of other data, or where they disagree, nothing."""
    if not spec or Path(spec).suffix == ".safetensors":
        return {}
    parts = [part for part, _ in parse_sources(spec)]
    if not all(is_tokenised(part) for part in parts):
        return {}
    folders = {folder_of(url) for part in parts for url in token_shards(part)}
    found = [TokenManifest.load(folder).tokenizers for folder in sorted(folders)]
    gone = [name for name in found[0].values() if os.path.isabs(name) and not os.path.isdir(name)] if found else []
    if gone:
        _LOG.warning(
            "the tokenizer that %s was encoded with is no longer in %s; name tokenizer.image and .text", spec, gone[0]
        )
    return dict(found[0]) if found and not gone and all(other == found[0] for other in found) else {}


def open_documents(config: TrainConfig) -> DocumentTokens | None:
    """The documents of `data.documents`, None where there are none. Raises as `DocumentTokens`."""
    spec = config.data.documents
    return DocumentTokens(spec, config.seed) if spec else None


def check_declared(config: TrainConfig, source: TokenTable | ShardTokens) -> None:
    """Raise ValueError where `data.vocabulary` and `data.grid` declare something else than the data has."""
    name, side = config.data.vocabulary, config.data.grid
    if name:
        wanted, found = named_vocabulary(name), source.vocabulary
        if any(getattr(wanted, key) != getattr(found, key) for key in ("size", "text", "image", "mask_id")):
            raise ValueError(
                f"data.vocabulary is {name!r} (text {wanted.text}, image {wanted.image}), {config.data.train!r} has text "
                f"{found.text}, image {found.image}; encode the data with the tokenizers of {name!r} or change the setting"
            )
    if side and source.grid != (side, side):
        raise ValueError(f"data.grid is {side}, {config.data.train!r} has {source.grid[0]} x {source.grid[1]} codes")


def phases(config: TrainConfig) -> tuple[tuple[int, int], ...] | None:
    """The curriculum in global sample indices."""
    total = config.steps * config.rows_per_step
    return tuple((round(float(share) * total), int(level)) for share, level in config.data.curriculum) or None


def _files(spec: str) -> set[str]:
    """Where the files of weighted sets really are."""
    urls = [url for pattern, _ in parse_sources(spec) for url in expand_shards(pattern)]
    return {url if is_remote(url) else os.path.realpath(url) for url in urls}


def _trained_on(validation: str, shared: str) -> ValueError:
    return ValueError(
        f"data.validation = {validation!r} is trained on, too ({shared}); name other rows, or leave it empty"
    )


def _open(pattern: str, config: TrainConfig, name: str) -> TokenTable | ShardTokens:
    if Path(pattern).suffix == ".safetensors":
        return TokenTable.load(pattern)
    if is_tokenised(pattern):
        return open_shards(pattern)
    image, text = config.tokenizer.image, config.tokenizer.text
    side = config.data.image_size
    raw = [part for part, _ in parse_sources(pattern) if not is_tokenised(part)]
    height, width = (side, side) if side else size_of(raw)
    return open_shards(
        pattern,
        cache=Path(config.output) / "tokens" / name,
        image_tokenizer=VQImageTokenizer.from_pretrained(image) if image else None,
        text_tokenizer=TextTokenizer.from_pretrained(text) if text else None,
        settings=EncodeSettings(height, config.data.text_length, image_width=0 if width == height else width),
        allow_missing=config.data.allow_missing,
    )


class DataLosses:
    """OUTPUT/skipped.json: `counts` by reason, and what they are made of.

    `encoding` is what the encoding of raw shards left out, as the token shards' manifests say (its first 1000 per reason by
    name); `reading` is every row or shard that was lost since, met while training. Every process meets its own part of the
    latter, and after a restart the same again: each counts once. Token tables cannot lose rows.
    """

    def __init__(self, folder: Path, sources: Sequence[TokenSource | DocumentTokens | None]) -> None:
        self.path = folder / SKIPPED
        self._shards = [s for s in sources if isinstance(s, WeightedShards)]
        self._met: set[Skip] = set()  # by any process, before a restart or since
        if self.path.is_file():
            entries = read_json(self.path, "a record of skipped data").get("reading")
            fix = f"{str(self.path)!r}: reading, which remembers what was skipped before (remove the file to forget it)"
            check_value(entries, list[list[str]], fix)
            for entry in entries:
                check_value(tuple(entry), tuple[str, str, str, str], fix)
            self._met = {Skip(*entry) for entry in entries}
        self._encoding = SkipReport()
        for report in {k: v for source in self._shards for k, v in source.encoding.items()}.values():
            self._encoding = self._encoding.merge(report)

    def counts(self) -> dict[str, int]:
        """Events by reason, as far as this process knows."""
        return dict(Counter(self._encoding.counts) + Counter(skip.reason for skip in self._met | self.met()))

    def line(self) -> str:
        """One line for a person; empty when nothing was left out."""
        counts = self.counts()
        listed = ", ".join(f"{n} {reason}" for reason, n in sorted(counts.items()))
        return f"skipped {sum(counts.values())} of the data ({listed}); see {self.path}" if counts else ""

    def save(self, parallel: Parallel) -> None:
        """Join what all processes met, all of which must call this; rank 0 writes."""
        own = json.dumps([astuple(skip) for skip in self.met()])
        self._met |= {Skip(*entry) for text in parallel.collect(own) for entry in json.loads(text)}
        if parallel.main:
            content: dict[str, Any] = {"counts": dict(sorted(self.counts().items()))}
            content |= {"encoding": self._encoding.state_dict(), "reading": sorted(astuple(s) for s in self._met)}
            replace_text(self.path, json.dumps(content, indent=1))

    def met(self) -> set[Skip]:
        """What this process could not read so far."""
        return {skip for source in self._shards for skips in source.report.examples.values() for skip in skips}
