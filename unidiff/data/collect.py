"""Pictures and captions as people have them (folders, tables, parquet) to raw shards, with an account of what is left out."""

from __future__ import annotations

import csv
import json
import os
import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

from PIL import Image, ImageColor, ImageOps

from unidiff.addresses import Unreachable, scheme
from unidiff.data import report
from unidiff.data.members import IMAGE_TYPES, is_blank, member_type
from unidiff.data.report import Skip, SkipReport, Unusable, printable
from unidiff.data.sources import expand_shards
from unidiff.data.tar import ShardWriter
from unidiff.errors import check_regular, explain, first_line, import_extra, read_json, reading
from unidiff.files import locked, write_json
from unidiff.pictures import open_picture
from unidiff.schema import Between, check_fields, from_data

NOTE = "shards.json"
TABLES = ("csv", "tsv", "jsonl", "parquet")
PICTURES = ("image", "picture", "file_name", "filename", "path", "file", "img", "jpg", "png", "url")
CAPTIONS = ("caption", "text", "description", "prompt", "txt", "title", "label")
"""Columns of these names are found, the first that there is."""
_TOGETHER = 64
Side = Annotated[int, Between(1, 2**14)]


@dataclass(frozen=True)
class ShardSettings:
    """How pictures become those of shards.

    Args:
        size: (height, width) in pixels; None leaves each as large as it is.
        fit: where its sides are others: `crop` keeps the centre, `pad` all of it with edges of `background`, `stretch`
            changes the proportions.
        background: colour under transparent pixels and of edges, by name or as #rrggbb.
        picture_column, caption_column: of a table; empty takes the first of `PICTURES` and `CAPTIONS` that there is.
        form: of the written pictures; jpg loses a little.
        seed: of the order of the samples; those of parquet files stay in theirs.
    """

    size: tuple[Side, Side] | None = None
    fit: Literal["crop", "pad", "stretch"] = "crop"
    background: str = "white"
    picture_column: str = ""
    caption_column: str = ""
    first_line: bool = False  # of a text is the caption
    form: Literal["png", "jpg", "webp"] = "png"
    samples_per_shard: Annotated[int, Between(1, 10**6)] = 1000
    workers: Annotated[int, Between(1, 256)] = 2
    seed: Annotated[int, Between(0, 2**62)] = 0

    def __post_init__(self) -> None:
        check_fields(self, "")
        try:
            ImageColor.getrgb(self.background)
        except ValueError as error:
            raise ValueError(f"background is {self.background!r}; expected a colour, as white or #ffcc00") from error


@dataclass(frozen=True)
class ShardsNote:
    """`shards.json`: what a folder of raw shards holds, so that nobody has to say it again."""

    size: tuple[Side, Side] | None  # (height, width) of all pictures; None: they differ
    shards: dict[str, int]  # samples by file name
    settings: dict[str, Any] = field(default_factory=dict)  # of `ShardSettings`
    skipped: dict[str, Any] = field(default_factory=dict)  # `SkipReport.state_dict()`

    @property
    def samples(self) -> int:
        return sum(self.shards.values())


def noted(shards: Sequence[str]) -> ShardsNote | None:
    """The note beside raw shards, if they all lie in one folder of this machine that has one."""
    folders = {Path(url).parent for url in shards if scheme(url) == ""}
    path = folders.pop() / NOTE if len(folders) == 1 else None
    if path is None or not path.is_file():
        return None
    return from_data(ShardsNote, read_json(path, "a note on shards"), repr(str(path)))


def write_note(folder: Path, *about: Any) -> ShardsNote:
    """Write `shards.json`, of the fields of `ShardsNote`, into the folder of the shards."""
    note = ShardsNote(*about)
    write_json(folder / NOTE, asdict(note))
    return note


def size_of(shards: str | Sequence[str]) -> tuple[int, int]:
    """(height, width) of the pictures of raw shards: as their note says, else 256 x 256, to which they are cut."""
    note = noted(expand_shards(shards))
    return (note and note.size) or (256, 256)


@dataclass(frozen=True)
class _Record:
    """A sample as it was found: where its picture and its words are, as values or as calls that read them."""

    name: str
    picture: Any  # what `open_picture` takes, or None
    caption: Callable[[], str]
    about: Callable[[], Any]  # its json


def make_shards(
    source: str | Path, out: Path, settings: ShardSettings, on_samples: Callable[[int, int | None], None] | None = None
) -> ShardsNote:
    """Write every usable sample of `source` into tars in `out`, with `shards.json` beside them.

    Args:
        source: a folder of pictures with `.txt` files of the same names (and `.json` with questions), one with a
            `metadata.csv`, `.jsonl` or `.parquet` (Hugging Face's imagefolder), one of parquet files, or a CSV, TSV, JSONL
            or parquet file. Tables name pictures by a path beside them or an address, or hold their bytes.
        on_samples: called as samples are done, with how many more, and how many there are (None: unknown).

    Raises:
        FileNotFoundError: no such source. ValueError: one that holds no samples, a column that is not there, an `out` that
            holds shards already.
    """
    skipped = SkipReport()
    found, total = _records(Path(source), settings, skipped)
    with locked(out, "making shards"):
        if any(out.glob("*.tar")):
            raise ValueError(f"{str(out)!r} holds shards already; name another folder")
        number = 0
        with ThreadPoolExecutor(settings.workers) as pool, ShardWriter(out, settings.samples_per_shard) as writer:
            while batch := list(islice(found, _TOGETHER)):
                for done in pool.map(partial(_sample, settings=settings, source=str(source)), batch):
                    if isinstance(done, Skip):
                        skipped.add(done)
                        continue
                    writer.write(f"{number:08d}", done)
                    number += 1
                if on_samples is not None:
                    on_samples(len(batch), total)
        if not number:
            raise ValueError(f"{str(source)!r} holds no usable sample; {skipped.brief()}")
        return write_note(out, settings.size, writer.written, asdict(settings), skipped.state_dict())


def _sample(record: _Record, settings: ShardSettings, source: str) -> dict[str, Any] | Skip:
    """The members of a sample, or why there are none."""
    name = printable(record.name)
    try:
        try:
            words = record.caption()
        except (OSError, ValueError) as error:
            gone = isinstance(error, FileNotFoundError | LookupError)
            raise Unusable(
                report.MISSING_MEMBER if gone else report.BAD_CAPTION, explain(error) or first_line(error)
            ) from error
        if settings.first_line:
            words = next(iter(words.strip().splitlines()), "")
        if is_blank(words):
            raise Unusable(report.EMPTY_CAPTION, "no words")
        try:
            if record.picture is None:
                raise FileNotFoundError("no picture")
            picture = fitted(open_picture(record.picture, background=settings.background), settings)
        except (OSError, ValueError, MemoryError) as error:
            gone = isinstance(error, FileNotFoundError) or isinstance(error.__cause__, Unreachable)
            raise Unusable(
                report.MISSING_MEMBER if gone else report.CORRUPT_IMAGE, explain(error) or first_line(error)
            ) from error
        try:
            about = record.about()
        except (OSError, ValueError) as error:
            raise Unusable(report.BAD_JSON, explain(error) or first_line(error)) from error
        return {settings.form: picture, "txt": words, "json": {"source": name, **about}}
    except Unusable as error:
        return Skip(error.reason, printable(source), name, str(error))


def fitted(picture: Image.Image, settings: ShardSettings) -> Image.Image:
    """An RGB picture of `settings.size`."""
    if settings.size is None:
        return picture
    height, width = settings.size
    if settings.fit == "stretch":
        return picture.resize((width, height), Image.Resampling.BICUBIC)
    if settings.fit == "crop":
        return ImageOps.fit(picture, (width, height), Image.Resampling.BICUBIC)
    scale = min(width / picture.width, height / picture.height)
    inner = [max(1, round(side * scale)) for side in picture.size]
    padded = Image.new("RGB", (width, height), settings.background)
    small = picture.resize((inner[0], inner[1]), Image.Resampling.BICUBIC)
    padded.paste(small, ((width - inner[0]) // 2, (height - inner[1]) // 2))
    return padded


def _records(source: Path, settings: ShardSettings, skipped: SkipReport) -> tuple[Iterator[_Record], int | None]:
    """All samples of a source, and how many they are, where that is known."""
    if not source.exists():
        raise FileNotFoundError(f"{str(source)!r} does not exist; name a folder of pictures, or a table of them")
    if source.is_dir():
        files = sorted(path for path in source.rglob("*") if path.is_file() and not path.name.startswith("."))
        named = [path for path in files if path.stem == "metadata" and member_type(path.name) in TABLES]
        tables = named or [path for path in files if member_type(path.name) == "parquet"]
    else:
        check_regular(source)
        tables = [source]
        if member_type(source.name) not in TABLES:
            raise ValueError(f"{str(source)!r} is no table; expected a folder, or a file in {', '.join(TABLES)}")
    if tables and all(member_type(path.name) == "parquet" for path in tables):
        return _parquet(tables, settings)
    found = [r for path in tables for r in _table(path, settings)] if tables else _pictures(source, files, skipped)
    if not found:
        held = ", ".join(sorted({path.suffix or "no ending" for path in files})) if source.is_dir() else "no rows"
        raise ValueError(f"{str(source)!r} holds no pictures ({', '.join(IMAGE_TYPES)}); it holds {held or 'nothing'}")
    random.Random(settings.seed).shuffle(found)  # held-out rows are the last ones, and folders are sorted
    return iter(found), len(found)


def _pictures(folder: Path, files: list[Path], skipped: SkipReport) -> list[_Record]:
    """Pictures, each with the text of the same name."""
    found = []
    for path in files:
        if member_type(path.name) in IMAGE_TYPES:
            json_file = path.with_suffix(".json")
            about = partial(read_json, json_file) if json_file.is_file() else dict
            caption = partial(path.with_suffix(".txt").read_text, encoding="utf-8-sig")
            found.append(_Record(str(path.relative_to(folder)), path, caption, about))
        elif member_type(path.name) not in ("txt", "json"):
            skipped.ignore(path.suffix[1:])
    return found


def _table(path: Path, settings: ShardSettings) -> list[_Record]:
    """The rows of a CSV, TSV or JSONL file."""
    kind = member_type(path.name)
    with reading(path, f"a {kind} table in UTF-8"), open(path, encoding="utf-8-sig", newline="") as file:
        if kind == "jsonl":
            rows = [json.loads(line) for line in file if line.strip()]
            if not all(isinstance(row, dict) for row in rows):
                raise ValueError("a line of it is no mapping")
        else:
            rows = list(csv.DictReader(file, delimiter="\t" if kind == "tsv" else ","))
    if not rows:
        return []
    columns = _columns(path, list(dict.fromkeys(name for row in rows for name in row if name)), settings)
    return [_row(row, columns, path.parent, f"row {number}") for number, row in enumerate(rows, 1)]


def _parquet(paths: list[Path], settings: ShardSettings) -> tuple[Iterator[_Record], int]:
    """The rows of parquet files, in their order."""
    parquet = import_extra("pyarrow.parquet", "parquet files need pyarrow; run pip install 'unidiff[data]'")
    files = []
    for path in paths:
        with reading(path, "a parquet file"):
            files.append(parquet.ParquetFile(path))
    columns = [_columns(path, file.schema_arrow.names, settings) for path, file in zip(paths, files, strict=True)]

    def rows() -> Iterator[_Record]:
        for path, file, names in zip(paths, files, columns, strict=True):
            number = 0
            wanted = [*names, "qa"] if "qa" in file.schema_arrow.names else list(names)
            for batch in file.iter_batches(_TOGETHER, columns=wanted):
                for row in batch.to_pylist():
                    number += 1
                    yield _row(row, names, path.parent, f"{path.name} row {number}")

    return rows(), sum(file.metadata.num_rows for file in files)


def _columns(path: Path, names: Sequence[str], settings: ShardSettings) -> tuple[str, str]:
    """The columns of pictures and captions."""
    found = []
    asked = ((settings.picture_column, PICTURES, "picture"), (settings.caption_column, CAPTIONS, "caption"))
    for own, known, what in asked:
        column = own if own in names else "" if own else next((name for name in known if name in names), "")
        if not column:
            raise ValueError(
                f"{str(path)!r} has no column {own or known[0]!r} of {what}s; it has {', '.join(names)}: name one of them "
                f"with --{what}-column"
            )
        found.append(column)
    return found[0], found[1]


def _row(row: dict[str, Any], columns: tuple[str, str], folder: Path, name: str) -> _Record:
    picture, words = row.get(columns[0]), row.get(columns[1])
    if isinstance(picture, dict):  # as Hugging Face's datasets keep them
        name = f"{name} {picture.get('path') or ''}".strip()
        picture = picture.get("bytes") or picture.get("path")
    if isinstance(picture, str) and picture:
        name = f"{name} {picture[-100:]}"
        picture = picture if scheme(picture) else os.path.join(folder, picture)
    elif not isinstance(picture, bytes):
        picture = None

    def caption() -> str:
        if not isinstance(words, str):
            raise LookupError(f"{columns[1]} holds no text")
        return words

    return _Record(name, picture, caption, lambda: {"qa": row["qa"]} if row.get("qa") else {})
