"""`tokens.json`: what a folder of pre-tokenised shards holds, written last, and what shards are known by later."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from unidiff.addresses import Unreachable, fetch, is_remote, local_path, remote_stamp
from unidiff.data.report import SkipReport
from unidiff.data.sources import check_scheme, is_shard_name, refuse_missing
from unidiff.errors import DamagedFile, few, first_line, reading
from unidiff.files import file_stamp, replace_text
from unidiff.schema import Between, Index, Width, check_fields, from_data
from unidiff.tokens import Vocabulary

MANIFEST = "tokens.json"
_MOST_BYTES = 2**28
Samples = Annotated[int, Between(0, 10**6)]  # of one shard
Stamp = dict[str, int | str]
"""size in bytes (-1: there is no such shard), time of change and hash, as far as they are known."""
_ASKING = 16  # shards at a time


@dataclass(frozen=True)
class TokenManifest:
    """What the samples of a folder are; each modality is counted from 0. Raises ValueError for values that no encoding writes.

    `pairs`: members `codes.npy` [h, w], `text.npy` [T], and optionally `questions.npy` [Q, T] with `answer_start.npy` [Q].
    `documents`: `tokens.npy` [n], n at most T, and `images.npy` [k], where in it images of h * w codes begin.
    """

    vocabulary: dict[str, Any]  # `Vocabulary.to_dict()`
    text_prefix: Index  # leading caption positions that are always given
    text_length: Annotated[int, Between(1)]  # T
    grid: tuple[Width, Width]  # (h, w)
    shards: dict[str, Samples]  # samples by file name, in order
    questions: int = 0  # pairs in all
    cut_captions: int = 0  # those that were too long
    long_questions: int = 0  # pairs left out because they did not fit
    fingerprint: str = ""  # of `asked` and the sources
    skipped: dict[str, Any] = field(default_factory=dict)  # `SkipReport.state_dict()` of the encoding run
    kind: Literal["pairs", "documents"] = "pairs"
    sources: dict[str, Stamp] = field(default_factory=dict)  # of the raw shards when they were read, by name
    files: dict[str, Stamp] = field(default_factory=dict)  # `token_stamp` of the token shards when they were written
    bad_questions: int = 0  # entries of `qa` left out because they are no pair of texts
    tokenizers: dict[str, str] = field(
        default_factory=dict
    )  # folders or hub names of `image` and `text`, where it was told
    asked: dict[str, Any] = field(default_factory=dict)  # settings, and hashes of shards' names and tokenizers

    def __post_init__(self) -> None:
        check_fields(self, "")
        Vocabulary.from_dict(self.vocabulary)
        if self.text_prefix > self.text_length:
            raise ValueError(f"text_prefix {self.text_prefix} is larger than text_length {self.text_length}")
        for name in (*self.shards, *self.files):
            if "/" in name or not is_shard_name(name):
                raise ValueError(f"{name!r} is no name of a token shard")
        if self.skipped:
            SkipReport.from_state_dict(self.skipped)

    @property
    def samples(self) -> int:
        return sum(self.shards.values())

    def layout(self) -> tuple[Any, ...]:
        """What sources that are mixed must have in common."""
        return Vocabulary.from_dict(self.vocabulary), self.text_prefix, self.text_length, tuple(self.grid)

    def save(self, folder: str | Path) -> None:
        replace_text(Path(folder) / MANIFEST, json.dumps({"format": 1, **asdict(self)}, indent=1))

    @classmethod
    def load(cls, folder: str) -> TokenManifest:
        """Read the manifest of a local folder or of an http(s) folder.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it cannot be read, a refused source, or another version wrote it.
        """
        where = f"{folder.rstrip('/')}/{MANIFEST}" if folder else MANIFEST
        check_scheme(where)
        path = None if is_remote(where) else Path(local_path(where))
        try:
            if path is not None and not path.is_file():
                raise Unreachable("no such file", gone=True)
            with reading(where, "a token manifest"):
                data = fetch(where, _MOST_BYTES) if path is None else path.read_bytes()
        except Unreachable as error:
            if error.gone:
                raise FileNotFoundError(f"{where} does not exist; `unidiff encode` writes it") from error
            raise
        try:
            content = json.loads(data.decode("utf-8-sig"))
            if not isinstance(content, dict) or content.pop("format", None) != 1:
                raise ValueError("another format")
            return from_data(cls, content, "it")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DamagedFile(f"{where} is not a token manifest: {first_line(error)}") from error


def source_stamps(urls: Sequence[str], allow_missing: bool = False) -> dict[str, Stamp]:
    """The stamp of every shard; of an address what its server says, which may be nothing.

    Raises:
        FileNotFoundError: shards that do not exist, unless they are allowed. OSError: one that cannot be read.
    """

    def stamp(url: str) -> Stamp:
        if not is_remote(url):
            return dict(file_stamp(url)) if os.path.isfile(url) else {"size": -1}
        try:
            return remote_stamp(url)
        except Unreachable as error:
            return {"size": -1} if error.gone else {}

    with ThreadPoolExecutor(_ASKING) as pool:
        stamps = dict(zip(urls, pool.map(stamp, urls), strict=True))
    if not allow_missing:
        refuse_missing([url for url in urls if stamps[url].get("size") == -1])
    return stamps


def changes(then: Mapping[str, Stamp], now: Mapping[str, Stamp]) -> str:
    """What differs between two sets of stamps, in words; empty where nothing is known to."""
    found = []
    for url, stamp in now.items():
        before = then.get(url, {})
        sizes = ["missing" if s.get("size") == -1 else s.get("size") for s in (before, stamp)]
        words = {"size": f"size {sizes[0]} -> {sizes[1]}", "time": "changed at another time", "hash": "other content"}
        known = {name: text for name, text in words.items() if name in before and name in stamp}
        if other := [text for name, text in known.items() if before[name] != stamp[name]]:
            found.append(f"{url} ({', '.join(other)})")
    return few(found)


def token_stamp(path: str | Path) -> Stamp:
    """Size and SHA-256 of a whole token shard: folders of them are moved about, so their time says nothing."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return {"size": os.fstat(file.fileno()).st_size, "hash": digest.hexdigest()}


def damage(folder: Path, files: Mapping[str, Stamp]) -> str:
    """Which token shards of a folder are not as they were written, in words."""
    found = []
    for name, stamp in files.items():
        path = folder / name
        if not path.is_file():
            found.append(f"{name} (missing)")
        elif token_stamp(path) != stamp:
            found.append(f"{name} (other content)")
    return few(found)
