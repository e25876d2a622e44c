"""MMBench (Liu et al. 2023, arXiv 2307.06281): a table of questions with up to several options, and with their pictures.

A question comes several times, each time with its options in another order, and counts where all of these are answered rightly.
Rows of one question have the same `index` but for whole millions.
"""

from __future__ import annotations

import base64
import csv
import io
import string
from collections.abc import Iterator, Sequence
from pathlib import Path

from unidiff.errors import DamagedFile, check_regular, reading
from unidiff.evaluation.suites.base import Result, Suite, with_choices
from unidiff.files import replace_text, replacing
from unidiff.pipelines.batch import Row

LETTERS = string.ascii_uppercase
_LONGEST_INDEX = (
    64  # characters; a longer `image` is the picture itself in base64, a shorter one the index of the row that has it
)
_MOST_BYTES = 2**28  # of a cell
Line = dict[str, str]


def table(path: Path, columns: Sequence[str] = ("index", "image", "question", "A", "B")) -> Iterator[Line]:
    """The rows of a table (TSV) by the names of its columns.

    Args:
        columns: those that it must have.

    Raises:
        ValueError: no table, one without these columns, a row that is longer or shorter than the first, or an index that
            is no number or comes twice.
    """
    check_regular(path)
    before, seen, number = csv.field_size_limit(_MOST_BYTES), set[int](), 1
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file, delimiter="\t")
            while True:
                with reading(path, "a table of MMBench (TSV)"):
                    line = next(rows, None)
                if line is None:
                    return
                number += 1
                if missing := [name for name in columns if name not in line]:
                    raise DamagedFile(f"{str(path)!r} has no column {missing[0]!r}; name a table of MMBench (TSV)")
                seen.add(_index_of(path, number, line, seen))
                yield line
    finally:
        csv.field_size_limit(before)


def _index_of(path: Path, number: int, line: Line, seen: set[int]) -> int:
    index = line["index"]
    if None in line or None in line.values():
        raise DamagedFile(f"{str(path)!r} has a row {number} of another length than its first; the file is damaged")
    if not index.isascii() or not index.isdecimal() or int(index) in seen:
        raise DamagedFile(
            f"{str(path)!r} has the index {index!r:.40} in row {number}; expected a number that no other row has"
        )
    return int(index)


def choices(line: Line) -> dict[str, str]:
    """The options of a row by letter."""
    return {letter: line[letter] for letter in LETTERS if line.get(letter)}


def _rows(path: Path) -> list[Row]:
    rows, known = list[Row](), set[str]()
    for line in table(path):
        own, index = len(line["image"]) > _LONGEST_INDEX, str(int(line["index"]))
        known |= {index} if own else set()
        picture = index if own else line["image"].strip()
        words = "\n".join(filter(None, (line.get("hint", "").strip(), line["question"].strip())))
        rows.append({"image": f"{picture}.jpg", "question": with_choices(words, choices(line)), "task": "answer"})
    for row in rows:
        if row["image"].removesuffix(".jpg") not in known:
            name = row["image"].removesuffix(".jpg")
            raise ValueError(f"{str(path)!r} has a row with the picture of row {name!r:.40}, which has none")
    return rows


def _pictures(path: Path, out: Path) -> Path:
    """The pictures of a table as files in the folder of a run; those that are there already stay.

    Raises:
        ValueError: what is no base64, or another picture of that name.
    """
    for line in table(path):
        if len(line["image"]) <= _LONGEST_INDEX:
            continue
        target = out / "pictures" / f"{int(line['index'])}.jpg"
        with reading(path, f"a table of MMBench (the picture of index {line['index']})"):
            data = base64.b64decode(line["image"], validate=True)
        if not target.exists():
            with replacing(target) as temporary:
                temporary.write_bytes(data)
        elif target.read_bytes() != data:
            raise ValueError(f"{str(target)!r} is another picture than {str(path)!r} has; name another folder (--out)")
    return out / "pictures"


def _write(path: Path, results: Sequence[Result], folder: Path) -> None:
    """`unidiff_NAME.tsv`: the columns of the table without its pictures, and `prediction`."""
    text, writer = io.StringIO(), None
    for line, result in zip(table(path), results, strict=True):
        cells = {name: cell for name, cell in line.items() if name not in ("image", "prediction")}
        cells["prediction"] = result.words
        if writer is None:
            writer = csv.DictWriter(text, list(cells), delimiter="\t", lineterminator="\n")
            writer.writeheader()
        writer.writerow(cells)
    replace_text(folder / f"unidiff_{path.stem}.tsv", text.getvalue())


MMBENCH = Suite(
    "mmbench",
    _rows,
    _write,
    "VLMEvalKit's vlmutil eval FILE (or FILE as .xlsx for MMBench's server), or unidiff eval score mmbench",
    reads=True,
    own_pictures=_pictures,
)
