"""Raw shards to token shards: images through an image tokenizer, captions and questions through the text tokenizer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unidiff.data.collate import TASK_TOKENS, TEXT_PREFIX, caption_row, check_task_tokens, qa_pairs, question_row
from unidiff.data.documents import document_parts, lay_out
from unidiff.data.images import ImagePreprocess
from unidiff.data.manifest import MANIFEST, TokenManifest, write_json
from unidiff.data.report import SkipReport
from unidiff.data.shards import ShardSource
from unidiff.data.tar import ShardWriter
from unidiff.tokens import Vocabulary
from unidiff.tokens.image import ImageEncoder
from unidiff.tokens.text import TextTokenizer

PROGRESS = "progress.json"


@dataclass(frozen=True)
class EncodeSettings:
    """How shards are encoded.

    Args:
        image_size: side of the square picture; a multiple of the image tokenizer's factor.
        text_length: tokens of the text span, task token and EOS fill included; of documents, of everything.
        batch_size: images per encoder call.
        samples_per_shard: samples per written tar.
        workers: decoding threads.
        documents: samples are interleaved documents (`document_parts`) in place of pairs.
    """

    image_size: int = 256
    text_length: int = 64
    batch_size: int = 32
    samples_per_shard: int = 1000
    workers: int = 2
    documents: bool = False

    def __post_init__(self) -> None:
        for name, least in {"text_length": 3, "batch_size": 1, "samples_per_shard": 1, "workers": 0}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} = {getattr(self, name)} must be at least {least}")


@dataclass
class _Progress:
    """Where an encoding run stands after its last complete shard."""

    fingerprint: str
    source: dict[str, Any] | None = None
    shards: dict[str, int] = field(default_factory=dict)
    questions: int = 0
    cut_captions: int = 0
    long_questions: int = 0


def encode_shards(
    shards: str | Sequence[str],
    image_tokenizer: ImageEncoder,
    text_tokenizer: TextTokenizer,
    out: str | Path,
    settings: EncodeSettings | None = None,
    on_shard: Callable[[int, SkipReport], None] | None = None,
) -> TokenManifest:
    """Encode every usable sample into `out`; damaged ones are skipped and listed in the manifest.

    A run that was stopped continues after its last complete shard and writes the same files as an uninterrupted one;
    a complete folder of the same run is left as it is.

    Args:
        shards: raw shards, see `expand_shards`; samples need an image and a caption, documents a `json`.
        image_tokenizer: pixels to codes.
        text_tokenizer: needs the specials eos, caption, question and answer.
        out: folder for the token shards and `tokens.json`.
        settings: see `EncodeSettings`.
        on_shard: called after every written shard with (samples so far, skip report).

    Raises:
        ValueError: settings that do not fit the tokenizers, a folder that holds another run, or no usable sample.
    """
    settings = settings or EncodeSettings()
    out = Path(out)
    check_task_tokens(text_tokenizer)
    prepare = ImagePreprocess(settings.image_size, image_tokenizer.factor)
    codes = (settings.image_size // image_tokenizer.factor) ** 2
    if settings.documents and settings.text_length <= codes:
        raise ValueError(
            f"text_length = {settings.text_length} leaves no room beside a picture of {codes} tokens; raise it"
        )
    source = _open(shards, settings)
    fingerprint = _fingerprint(source.shards, settings, image_tokenizer, text_tokenizer)
    if (done := _finished(out, fingerprint)) is not None:
        return done
    progress = _resume(out, fingerprint)
    if progress.source is not None:
        source.load_state_dict(progress.source)
    samples = iter(source)
    encoder = _Encoder(image_tokenizer, text_tokenizer, prepare, settings, progress)
    while rows := encoder.next_shard(samples):
        start = sum(progress.shards.values())
        with ShardWriter(out, len(rows), start=len(progress.shards)) as writer:
            for number, row in enumerate(rows, start):
                writer.write(f"{number:09d}", row)
        progress.shards |= writer.written
        progress.source = source.state_dict()
        write_json(out / PROGRESS, asdict(progress))
        if on_shard is not None:
            on_shard(sum(progress.shards.values()), source.report)
    if not progress.shards:
        raise ValueError(f"no usable sample in {len(source.shards)} shards; {source.report.brief()}")
    side = settings.image_size // image_tokenizer.factor
    specials = {name: text_tokenizer.special(name) for name in TASK_TOKENS}
    manifest = TokenManifest(
        vocabulary=Vocabulary.unified(text_tokenizer.size, image_tokenizer.codebook_size, specials).to_dict(),
        text_prefix=0 if settings.documents else TEXT_PREFIX,
        text_length=settings.text_length,
        grid=(side, side),
        shards=progress.shards,
        questions=progress.questions,
        cut_captions=progress.cut_captions,
        long_questions=progress.long_questions,
        fingerprint=fingerprint,
        skipped=source.report.state_dict(),
        kind="documents" if settings.documents else "pairs",
    )
    manifest.save(out)
    (out / PROGRESS).unlink(missing_ok=True)
    return manifest


class _Encoder:
    def __init__(
        self,
        image_tokenizer: ImageEncoder,
        text_tokenizer: TextTokenizer,
        prepare: ImagePreprocess,
        settings: EncodeSettings,
        progress: _Progress,
    ) -> None:
        self.image_tokenizer, self.text_tokenizer = image_tokenizer, text_tokenizer
        self.prepare, self.settings, self.progress = prepare, settings, progress
        self.code_type = np.int16 if image_tokenizer.codebook_size <= 2**15 else np.int32

    def next_shard(self, samples: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
        """Members of the next `samples_per_shard` samples; fewer at the end."""
        rows: list[dict[str, Any]] = []
        while len(rows) < self.settings.samples_per_shard:
            room = self.settings.samples_per_shard - len(rows)
            batch = list(islice(samples, min(self.settings.batch_size, room)))
            if not batch:
                break
            if self.settings.documents:
                rows += self._documents(batch)
                continue
            codes = self._codes([sample["image"] for sample in batch])
            rows += [self._row(sample, grid) for sample, grid in zip(batch, codes, strict=True)]
        return rows

    def _codes(self, images: list[Tensor]) -> np.ndarray:
        """Codes `[B, h, w]` of pictures of any size, `batch_size` at once."""
        parts = []
        for start in range(0, len(images), self.settings.batch_size):
            pictures = images[start : start + self.settings.batch_size]
            batch = torch.stack([self.prepare(picture) for picture in pictures])  # [B, 3, H, W]
            parts.append(self.image_tokenizer.encode(batch).cpu().numpy().astype(self.code_type))
        return np.concatenate(parts)

    def _documents(self, batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
        pictures = [part for sample in batch for part in sample["parts"] if not isinstance(part, str)]
        codes = iter(self._codes(pictures) if pictures else ())
        rows = []
        for sample in batch:
            parts = [part if isinstance(part, str) else next(codes) for part in sample["parts"]]
            document = lay_out(parts, self.text_tokenizer, self.settings.text_length)
            self.progress.cut_captions += document.cut
            origin = {"key": sample["__key__"], "shard": sample["__url__"]}
            rows.append({"tokens.npy": document.tokens, "images.npy": document.images, "json": origin})
        return rows

    def _row(self, sample: dict[str, Any], codes: np.ndarray) -> dict[str, Any]:
        length = self.settings.text_length
        caption = caption_row(self.text_tokenizer, sample["txt"], length)
        self.progress.cut_captions += caption.cut
        row: dict[str, Any] = {
            "codes.npy": codes,
            "text.npy": np.asarray(caption.ids, dtype=np.int32),
            "json": {"key": sample["__key__"], "shard": sample["__url__"]},
        }
        pairs = [question_row(self.text_tokenizer, q, a, length) for q, a in qa_pairs(sample.get("json"))]
        fitting = [pair for pair in pairs if pair is not None]
        self.progress.long_questions += len(pairs) - len(fitting)
        self.progress.questions += len(fitting)
        if fitting:
            row["questions.npy"] = np.asarray([pair.ids for pair in fitting], dtype=np.int32)  # [Q, T]
            row["answer_start.npy"] = np.asarray([pair.answer_start for pair in fitting], dtype=np.int32)  # [Q]
        return row


def _open(shards: str | Sequence[str], settings: EncodeSettings) -> ShardSource:
    if not settings.documents:
        return ShardSource(shards, ("image", "txt"), ("json",), workers=settings.workers)

    def read(sample: dict[str, Any]) -> dict[str, Any]:
        return sample | {"parts": document_parts(sample["json"], sample["images"])}

    return ShardSource(shards, ("json",), ("images",), workers=settings.workers, prepare=read)


def _fingerprint(shards: list[str], settings: EncodeSettings, image: ImageEncoder, text: TextTokenizer) -> str:
    # A probe picture stands for the image tokenizer's weights, whatever its class.
    side = settings.image_size
    probe = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    unchanged = (
        {"workers", "documents"} if not settings.documents else {"workers"}
    )  # folders from before there were any
    kept = {name: value for name, value in asdict(settings).items() if name not in unchanged}
    parts = [shards, kept, image.encode(probe).tolist(), sorted(text.tokenizer.get_vocab().items())]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _finished(out: Path, fingerprint: str) -> TokenManifest | None:
    if not (out / MANIFEST).is_file():
        return None
    manifest = TokenManifest.load(str(out))
    if manifest.fingerprint != fingerprint:
        raise ValueError(f"{str(out)!r} holds token shards of another run (shards, settings or tokenizers); remove it")
    return manifest


def _resume(out: Path, fingerprint: str) -> _Progress:
    path = out / PROGRESS
    for leftover in out.glob(".*.tmp"):  # of a run that was killed
        leftover.unlink(missing_ok=True)
    if not path.is_file():
        if out.is_dir() and any(out.glob("*.tar")):
            raise ValueError(f"{str(out)!r} already holds tar files; write token shards to an empty folder")
        return _Progress(fingerprint)
    progress = _Progress(**json.loads(path.read_text(encoding="utf-8")))
    if progress.fingerprint != fingerprint:
        raise ValueError(f"{str(out)!r} holds an unfinished run of other shards, settings or tokenizers; remove it")
    return progress
