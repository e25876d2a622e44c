"""`tokens.json`: what a folder of pre-tokenised shards holds. It is written last, so its presence means complete."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from webdataset.gopen import gopen

from unidiff.data.tar import check_scheme
from unidiff.files import replacing
from unidiff.tokens import Vocabulary

MANIFEST = "tokens.json"


@dataclass(frozen=True)
class TokenManifest:
    """What the samples of a folder are; each modality is counted from 0.

    `pairs`: members `codes.npy` [h, w], `text.npy` [T], and optionally `questions.npy` [Q, T] with `answer_start.npy` [Q].
    `documents`: `tokens.npy` [n], n at most T, and `images.npy` [k], where in it images of h * w codes begin.

    Attributes:
        vocabulary: `Vocabulary.to_dict()`.
        text_prefix: leading caption positions that are always given.
        text_length: T.
        grid: (h, w).
        shards: samples by file name, in order.
        questions: question / answer pairs in all.
        cut_captions: captions that were too long and were cut.
        long_questions: pairs left out because they did not fit.
        fingerprint: of sources, settings and tokenizers.
        skipped: `SkipReport.state_dict()` of the encoding run.
        kind: `pairs` or `documents`.
    """

    vocabulary: dict[str, Any]
    text_prefix: int
    text_length: int
    grid: tuple[int, int]
    shards: dict[str, int]
    questions: int = 0
    cut_captions: int = 0
    long_questions: int = 0
    fingerprint: str = ""
    skipped: dict[str, Any] = field(default_factory=dict)
    kind: str = "pairs"

    @property
    def samples(self) -> int:
        return sum(self.shards.values())

    def layout(self) -> tuple[Any, ...]:
        """What sources that are mixed must have in common."""
        return Vocabulary.from_dict(self.vocabulary), self.text_prefix, self.text_length, tuple(self.grid)

    def save(self, folder: str | Path) -> None:
        write_json(Path(folder) / MANIFEST, {"format": 1, **asdict(self)})

    @classmethod
    def load(cls, folder: str) -> TokenManifest:
        """Read the manifest of a local folder or of an http(s) folder.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it cannot be read, a refused source, or another version wrote it.
        """
        where = f"{folder.rstrip('/')}/{MANIFEST}" if folder else MANIFEST
        check_scheme(where)
        try:
            stream = gopen(where, "rb")
            try:
                data = stream.read()
            finally:
                stream.close()
        except OSError as error:
            raise FileNotFoundError(f"{where} does not exist; tokenizers/encode_shards.py writes it") from error
        try:
            content = json.loads(data)
            known = {f.name for f in fields(cls)}
            if isinstance(content, dict):
                content.setdefault("kind", "pairs")  # folders from before there were documents
            if not isinstance(content, Mapping) or content.get("format") != 1 or set(content) != known | {"format"}:
                raise ValueError("another format")
            Vocabulary.from_dict(content["vocabulary"])
            values = {k: v for k, v in content.items() if k != "format"}
            return cls(**values | {"grid": tuple(content["grid"])})
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{where} is not a token manifest: {error}") from error


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")
