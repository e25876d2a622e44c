"""Raw shards to token shards: images through an image tokenizer, captions and questions through the text tokenizer."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor

from unidiff.data.manifest import MANIFEST, Stamp, TokenManifest, changes, damage, source_stamps, token_stamp
from unidiff.data.report import SkipReport
from unidiff.data.rows import TEXT_PREFIX, caption_row, document_parts, lay_out, qa_pairs, question_row, task_tokens
from unidiff.data.shards import ImagePreprocess, ShardSource
from unidiff.data.tar import ShardWriter
from unidiff.errors import read_json, reading, writing
from unidiff.files import locked, remove_leftovers, replace_text
from unidiff.schema import Between, check_fields, differences, from_data, listed
from unidiff.tokens import Vocabulary
from unidiff.tokens.image.protocols import ImageEncoder
from unidiff.tokens.text import TextTokenizer

PROGRESS = "progress.json"
_AGAIN = "remove that folder to encode again, or name another one"
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class EncodeSettings:
    """How shards are encoded."""

    image_size: Annotated[int, Between(1, 2**14)] = 256  # height in pixels; a multiple of the tokenizer's factor
    text_length: Annotated[int, Between(3, 2**20)] = 64  # task token and EOS fill included; of documents, of everything
    batch_size: Annotated[int, Between(1, 2**16)] = 32  # images per encoder call
    samples_per_shard: Annotated[int, Between(1, 10**6)] = 1000
    workers: Annotated[int, Between(0, 256)] = 2  # decoding threads
    documents: bool = False  # samples are interleaved documents (`document_parts`) in place of pairs
    image_width: Annotated[int, Between(0, 2**14)] = 0  # 0: as high as wide

    def __post_init__(self) -> None:
        check_fields(self, "")

    @property
    def sides(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.image_size, self.image_width or self.image_size


@dataclass
class _Progress:
    """Where an encoding run stands after its last complete shard, in the names of `TokenManifest`. `source`: its position."""

    fingerprint: str
    sources: dict[str, Stamp]
    files: dict[str, Stamp] = field(default_factory=dict)
    source: dict[str, Any] | None = None
    shards: dict[str, int] = field(default_factory=dict)
    questions: int = 0
    cut_captions: int = 0
    long_questions: int = 0
    bad_questions: int = 0
    asked: dict[str, Any] = field(default_factory=dict)

    def save(self, out: Path) -> None:
        replace_text(out / PROGRESS, json.dumps(asdict(self), indent=1))


def encode_shards(
    shards: str | Sequence[str],
    image_tokenizer: ImageEncoder,
    text_tokenizer: TextTokenizer,
    out: str | Path,
    settings: EncodeSettings | None = None,
    on_shard: Callable[[int, SkipReport], None] | None = None,
    allow_missing: bool = False,
    again: bool = False,
    on_batch: Callable[[int], None] | None = None,
    tokenizers: Mapping[str, str] | None = None,
) -> TokenManifest:
    """Encode every usable sample into `out`; damaged ones are skipped and listed in the manifest.

    A run that was stopped continues after its last complete shard and writes the same files as an uninterrupted one;
    a complete folder of the same run is left as it is. Raw shards that have changed since, and token shards that are no
    longer as they were written, are noticed. One process at a time works in `out`.

    Args:
        shards: raw shards, see `expand_shards`; samples need an image and a caption, documents a `json`.
        text_tokenizer: needs the specials eos, caption, question and answer.
        out: folder for the token shards and `tokens.json`.
        on_shard: called after every written shard with (samples so far, skip report).
        allow_missing: raw shards that do not exist are counted in place of refused.
        on_batch: called after every batch with its number of samples.
        tokenizers: where `image` and `text` are from, for the manifest: who trains on it need not say it again.
        again: encode once more, with a note, what has changed or is damaged, in place of refusing.

    Raises:
        FileNotFoundError: a raw shard that does not exist.
        ValueError: settings that do not fit the tokenizers, a folder that holds another run or that another process works in,
            data that have changed, or no usable sample.
        OSError: a full or read-only disk, with the name of the file.
    """
    settings, out = settings or EncodeSettings(), Path(out)
    encoder = _Encoder(image_tokenizer, text_tokenizer, settings, on_batch)
    source = _open(shards, settings, allow_missing)
    fingerprint, asked = _identity(source.shards, settings, image_tokenizer, text_tokenizer)
    fresh = _Progress(fingerprint, source_stamps(source.shards, allow_missing), asked=asked)
    if done := _finished(out, fresh, again):
        return done
    with locked(out, "encoding"):
        try:
            done = _finished(out, fresh, again)
            return done or _encode(out, source, encoder, _resume(out, fresh, again), on_shard, tokenizers or {})
        finally:
            if not any(out.glob("*.tar")):  # a run that failed before its first shard leaves no note of itself
                (out / PROGRESS).unlink(missing_ok=True)


def _encode(
    out: Path, source: ShardSource, encoder: _Encoder, progress: _Progress,
    on_shard: Callable[[int, SkipReport], None] | None, tokenizers: Mapping[str, str],
) -> TokenManifest:  # fmt: skip
    """Fill `out`, which nobody else writes to."""
    if progress.source is not None:
        with reading(out / PROGRESS, "the progress of an encoding", _AGAIN):
            source.load_state_dict(progress.source)
    else:
        progress.save(out)  # a run that is killed within its first shard knows it again
    samples = iter(source)
    while rows := encoder.next_shard(samples, progress):
        start = sum(progress.shards.values())
        with ShardWriter(out, len(rows), start=len(progress.shards)) as writer:
            for number, row in enumerate(rows, start):
                writer.write(f"{number:09d}", row)
        progress.shards |= writer.written
        progress.files |= {name: token_stamp(out / name) for name in writer.written}
        progress.source = source.state_dict()
        progress.save(out)
        if on_shard is not None:
            on_shard(sum(progress.shards.values()), source.report)
    if not progress.shards:
        raise ValueError(f"no usable sample in {len(source.shards)} shards; {source.report.brief()}")
    noted = {f.name: getattr(progress, f.name) for f in fields(progress) if f.name != "source"}
    manifest = TokenManifest(
        **encoder.layout(), **noted, skipped=source.report.state_dict(), tokenizers=dict(tokenizers)
    )
    manifest.save(out)
    (out / PROGRESS).unlink(missing_ok=True)
    return manifest


class _Encoder:
    """Samples to the members of token shards. Raises `ValueError` for settings that do not fit the tokenizers."""

    def __init__(
        self,
        images: ImageEncoder,
        text: TextTokenizer,
        settings: EncodeSettings,
        on_batch: Callable[[int], None] | None,
    ) -> None:
        self.on_batch = on_batch
        self.images, self.text, self.settings, self.specials = images, text, settings, task_tokens(text)
        self.prepare = ImagePreprocess(settings.sides, images.factor)
        self.grid = settings.sides[0] // images.factor, settings.sides[1] // images.factor
        codes = self.grid[0] * self.grid[1]
        if settings.documents and settings.text_length <= codes:
            raise ValueError(
                f"text_length = {settings.text_length} leaves no room beside a picture of {codes} tokens; raise it"
            )
        self.code_type = np.int16 if images.codebook_size <= 2**15 else np.int32

    def layout(self) -> dict[str, Any]:
        """What the manifest says of every shard."""
        return {
            "vocabulary": Vocabulary.unified(self.text.size, self.images.codebook_size, self.specials).to_dict(),
            "text_prefix": 0 if self.settings.documents else TEXT_PREFIX,
            "text_length": self.settings.text_length,
            "grid": self.grid,
            "kind": "documents" if self.settings.documents else "pairs",
        }

    def next_shard(self, samples: Iterator[dict[str, Any]], counts: _Progress) -> list[dict[str, Any]]:
        """Members of the next `samples_per_shard` samples; fewer at the end. What is cut or left out is added to `counts`."""
        encode = self._documents if self.settings.documents else self._pairs
        rows: list[dict[str, Any]] = []
        samples = islice(samples, self.settings.samples_per_shard)
        while batch := list(islice(samples, self.settings.batch_size)):
            for sample, row in zip(batch, encode(batch, counts), strict=True):
                rows.append({**row, "json": {"key": sample["__key__"], "shard": sample["__url__"]}})
            if self.on_batch is not None:
                self.on_batch(len(batch))
        return rows

    def _codes(self, images: list[Tensor]) -> np.ndarray:
        """Codes `[B, h, w]` of pictures of any size, `batch_size` at once."""
        pictures, parts = map(self.prepare, images), []
        while batch := list(islice(pictures, self.settings.batch_size)):
            codes = self.images.encode(torch.stack(batch))  # [B, 3, H, W] -> [B, h, w]
            parts.append(codes.cpu().numpy().astype(self.code_type))
        return np.concatenate(parts)

    def _documents(self, batch: list[dict[str, Any]], counts: _Progress) -> Iterator[dict[str, Any]]:
        pictures = [part for sample in batch for part in sample["parts"] if not isinstance(part, str)]
        codes = iter(self._codes(pictures) if pictures else ())
        for sample in batch:
            parts = [part if isinstance(part, str) else next(codes) for part in sample["parts"]]
            document = lay_out(parts, self.text, self.settings.text_length)
            counts.cut_captions += document.cut
            yield {"tokens.npy": document.tokens, "images.npy": document.images}

    def _pairs(self, batch: list[dict[str, Any]], counts: _Progress) -> Iterator[dict[str, Any]]:
        length = self.settings.text_length
        for sample, codes in zip(batch, self._codes([sample["image"] for sample in batch]), strict=True):
            caption = caption_row(self.text, sample["txt"], length)
            row: dict[str, Any] = {"codes.npy": codes, "text.npy": np.asarray(caption.ids, dtype=np.int32)}
            pairs, bad = qa_pairs(sample.get("json"))
            found = [question_row(self.text, question, answer, length) for question, answer in pairs]
            fitting = [pair for pair in found if pair is not None]
            if fitting:
                row["questions.npy"] = np.asarray([pair.ids for pair in fitting], dtype=np.int32)  # [Q, T]
                row["answer_start.npy"] = np.asarray([pair.answer_start for pair in fitting], dtype=np.int32)  # [Q]
            counts.cut_captions += caption.cut
            counts.bad_questions += bad
            counts.long_questions += len(pairs) - len(fitting)
            counts.questions += len(fitting)
            yield row


def fitting_text_length(
    shards: str | Sequence[str], tokenizer: TextTokenizer, looked_at: int = 10_000, most: int = 256
) -> int:
    """Tokens of a text span that holds the captions and questions of the first samples, as a multiple of 8, at most `most`."""
    longest = 0
    for sample in islice(ShardSource(shards, ("txt",), ("json",), announce=False, allow_missing=True), looked_at):
        pairs = qa_pairs(sample.get("json"))[0]
        longest = max([longest, len(tokenizer.encode(sample["txt"].strip())) + 2]
                      + [len(tokenizer.encode(a.strip())) + len(tokenizer.encode(b.strip())) + 3 for a, b in pairs])  # fmt: skip
    return min(most, -(-max(longest, 3) // 8) * 8)


def _open(shards: str | Sequence[str], settings: EncodeSettings, allow_missing: bool) -> ShardSource:
    """Pairs, or documents with their `parts`."""

    def with_parts(sample: dict[str, Any]) -> dict[str, Any]:
        return sample | {"parts": document_parts(sample["json"], sample["images"])}

    wanted: dict[str, Any] = {"require": ("image", "txt"), "optional": ("json",)}
    if settings.documents:
        wanted = {"require": ("json",), "optional": ("images",), "prepare": with_parts}
    return ShardSource(shards, **wanted, workers=settings.workers, allow_missing=allow_missing, announce=False)


def _identity(
    shards: list[str], settings: EncodeSettings, image: ImageEncoder, text: TextTokenizer
) -> tuple[str, dict[str, Any]]:
    """The fingerprint of a run, and what it is of: settings, and hashes of the rest."""
    # A probe picture stands for the image tokenizer's weights, whatever its class.
    probe = torch.rand(1, 3, *settings.sides, generator=torch.Generator().manual_seed(0))
    kept = asdict(settings)
    added = {"documents": settings.documents, "image_width": settings.image_width}  # folders from before there were any
    for name in ("workers", *(name for name, value in added.items() if not value)):
        del kept[name]
    codes, words = image.encode(probe).tolist(), sorted(text.tokenizer.get_vocab().items())
    hashed = {"shards_hash": shards, "image_tokenizer_hash": codes, "text_tokenizer_hash": words}
    asked = {**kept, "shards": len(shards), **{name: _hash(value) for name, value in hashed.items()}}
    return _hash([shards, kept, codes, words])[:16], asked


def _hash(data: Any) -> str:
    return hashlib.sha256(json.dumps(data).encode()).hexdigest()


def _another(done: TokenManifest | _Progress, fresh: _Progress) -> str:
    """How a run is another one than that of a folder, in words."""
    changed = differences(done.asked, fresh.asked) if done.asked else []
    return listed(changed) if changed else "shards, settings or tokenizers"


def _finished(out: Path, fresh: _Progress, again: bool) -> TokenManifest | None:
    """The manifest of a complete folder of the same run from the same data."""
    if not (out / MANIFEST).is_file():
        return None
    manifest = TokenManifest.load(str(out))
    if manifest.fingerprint != fresh.fingerprint:
        raise ValueError(f"{str(out)!r} holds token shards of another run ({_another(manifest, fresh)}); {_AGAIN}")
    if not manifest.sources:
        _LOG.warning("%s is from before unidiff noted what it was made from; whether that changed is unknown", out)
    problem = _problem(out, manifest, fresh)
    if problem and not again:
        raise ValueError(
            f"{str(out)!r} no longer fits: {problem}; {_AGAIN}; to train on it as it is, name it as data.train"
        )
    return None if problem else manifest


def _resume(out: Path, fresh: _Progress, again: bool) -> _Progress:
    """Where to go on in `out`, which is emptied of what no longer fits where that is asked for."""
    for stray in out.iterdir():  # of runs that were killed: nobody else is here
        if found := re.fullmatch(r"\.(\d{5,}\.tar|\d{5,}|tokens\.json|progress\.json)\..*", stray.name):
            remove_leftovers(out / found[1])
    path = out / PROGRESS
    if (out / MANIFEST).is_file():  # complete, but `_finished` found a fault
        return _clear(out, TokenManifest.load(str(out)), fresh)
    if not path.is_file():
        if any(out.glob("*.tar")):
            raise ValueError(f"{str(out)!r} already holds tar files; write token shards to an empty folder")
        return fresh
    with reading(path, "the progress of an encoding", _AGAIN):
        progress = from_data(_Progress, read_json(path, "the progress of an encoding"), "it")
    if not progress.shards and not any(out.glob("*.tar")):
        return fresh
    if progress.fingerprint != fresh.fingerprint:
        raise ValueError(f"{str(out)!r} holds a part of another run ({_another(progress, fresh)}); {_AGAIN}")
    problem = _problem(out, progress, fresh)
    if problem and not again:
        raise ValueError(f"{str(out)!r} holds an unfinished run that no longer fits: {problem}; {_AGAIN}")
    return _clear(out, progress, fresh) if problem else progress


def _problem(out: Path, done: TokenManifest | _Progress, fresh: _Progress) -> str:
    """Why tokens cannot be used any more, in words."""
    if changed := changes(done.sources, fresh.sources):
        return f"raw shards have changed since: {changed}"
    damaged = damage(out, done.files)
    return f"token shards are not as they were written: {damaged}" if damaged else ""


def _clear(out: Path, done: TokenManifest | _Progress, fresh: _Progress) -> _Progress:
    """Remove an encoding, the manifest first: without it nothing passes for complete."""
    _LOG.warning("%s is encoded again: %s", out, _problem(out, done, fresh))
    for name in (MANIFEST, PROGRESS, *done.shards):
        with writing(out / name):
            (out / name).unlink(missing_ok=True)
    return fresh
