"""Many calls from a file, a line each: prompts, pictures or questions; shared by processes, and gone on with after a stop."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from unidiff.config import flat
from unidiff.errors import check_regular, explain, reading
from unidiff.files import beside
from unidiff.pipelines.decode import row_seeds
from unidiff.pipelines.sheet import save_image
from unidiff.process import versions
from unidiff.schema import check_same, check_value
from unidiff.tokens.text import between_holes, letters_note, notes_on

MANIFEST = "manifest.jsonl"
_READ = {"image", "question"}  # of these alone words are written, and no picture is drawn
_SAID = ("prompt", "text", "negative_prompt", "question")
_KEYS = {*_READ, *_SAID, "mask_image", "reference", "task"}
Row = Mapping[str, str]


def read_rows(path: Path) -> list[Row]:
    """Arguments of a call of the pipeline for every line: an object of `.jsonl`, else a prompt; empty lines are left out.

    Names of pictures count from the file's own folder.

    Raises:
        ValueError: no UTF-8, a line that is no object of texts, or an argument that goes with no task.
    """
    check_regular(path)
    with reading(path, "prompts (a text in UTF-8, one a line)"):
        lines = [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{str(path)!r} holds no prompts; write one in each line")
    if path.suffix != ".jsonl":
        return [{"prompt": line.strip()} for line in lines]
    rows = []
    for number, line in enumerate(lines, 1):
        with reading(path, f"JSON lines (line {number})"):
            row = json.loads(line)
        check_value(row, dict[str, str], f"{path}, line {number}")
        if unknown := sorted(row.keys() - _KEYS):
            raise ValueError(f"{path}, line {number} has {unknown[0]!r}; expected some of {sorted(_KEYS)}")
        rows.append(row)
    return rows


def run_rows(
    pipe: Any,
    rows: Sequence[Row],
    out: Path,
    folder: Path,
    seed: int = 0,
    batch_size: int = 16,
    rank: int = 0,
    size: int = 1,
    tick: Callable[[int, int | None], None] = lambda more, total: None,
    say: Callable[[str], None] = lambda note: None,
    about: Mapping[str, Any] | None = None,
    **options: Any,
) -> int:
    """Call the pipeline for every row that `out` does not have yet; returns how many rows of this process had to be refused.

    Rows come out the same in any batch and on any number of processes. Each is a line of `manifest.jsonl` when it is done:
    its number, arguments, seed, and `image` (a file beside it), `words` or `error`, and `notes` where a person should know
    something of it (words that the model does not know). One that was refused is tried again the next time, and its last
    line counts. The first line has all that results depend on, and the versions of libraries; where a run goes on with
    other versions, a line says so.

    Args:
        folder: where pictures that rows name lie.
        rank, size: of this process and of all; each takes every `size`-th row.
        tick: called with how many more are done, and of how many. say: called with the notes of all rows in one sentence.
        about: what else must be the same to go on in `out`. options: of every call.

    Raises:
        ValueError: a folder that holds something else, or rows of other arguments.
    """
    asked = {"rows": len(rows), "prompts_hash": digest_of(rows), "seed": seed, "about": about or {}, "options": options}
    entries = begin_manifest(out, asked, "--prompts", pipe.device)
    done = {entry["number"] for entry in entries if "error" not in entry}
    seeds = row_seeds(seed, len(rows)).tolist()
    own = [number for number in range(rank, len(rows), size)]
    todo, refused = [number for number in own if number not in done], 0
    notes = [notes_of(pipe, [row]) for row in rows] if (found := notes_of(pipe, rows)) else [[] for _ in rows]
    if found:
        count = sum(map(bool, notes))
        say(f"{count} of {len(rows)} rows (notes in {str(out / MANIFEST)!r} say which): {'; '.join(found)}")
    tick(len(own) - len(todo), len(own))
    for numbers in _batches(todo, rows, batch_size):
        entries = _called(pipe, rows, numbers, seeds, out, folder, options)
        add_to_manifest(out, [entry | ({"notes": n} if (n := notes[entry["number"]]) else {}) for entry in entries])
        refused += sum("error" in entry for entry in entries)
        tick(len(numbers), len(own))
    return refused


def notes_of(pipe: Any, rows: Sequence[Row]) -> list[str]:
    """What a person should know of rows before they are decoded: tasks that the model was not trained for where they are
    named, and words that it does not know; as the notes of a result."""
    notes = [pipe.layout.note(task) for task in dict.fromkeys(row["task"] for row in rows if "task" in row)]
    said = [words for row in rows for words in _said(row)]
    return [*filter(None, notes), *notes_on(said, pipe.texts, warned=False), *letters_note(said)]


def _said(row: Row) -> Iterator[str]:
    """The words of a row, without holes where the pipeline fills them."""
    for key in (key for key in _SAID if key in row):
        if key == "text" or (key == "prompt" and "task" not in row):
            with suppress(ValueError):  # the row will be refused
                yield from between_holes([row[key]])
        else:
            yield row[key]


def begin_manifest(
    out: Path, asked: Mapping[str, Any], made_by: str, device: object, alone: bool = False
) -> list[dict[str, Any]]:
    """What the manifest of `out` says is done, line by line; the folder and its manifest are begun where they are not there.

    Args:
        asked: all that results depend on, the first line of a new manifest; what an old one says must be the same. Beside
            it are versions of libraries, and a line says where they have become others.
        made_by: what fills the folder. device: of the model.
        alone: no other process writes here, so a line that was cut off goes; else it is left, and read as nothing.

    Raises:
        ValueError: a folder that holds something else, or results of something else that was asked for.
    """
    manifest, now = out / MANIFEST, versions(device)
    if out.exists() and not manifest.exists() and (not out.is_dir() or any(p.suffix != ".tmp" for p in out.iterdir())):
        raise ValueError(f"{str(out)!r} is no folder that {made_by} made; name a new one")
    out.mkdir(parents=True, exist_ok=True)
    fresh = beside(manifest, "tmp")
    here = json.loads(json.dumps(asked, default=str))
    fresh.write_text(json.dumps(here | {"versions": now}) + "\n", encoding="utf-8")
    with suppress(FileExistsError):
        os.link(fresh, manifest)  # by one process, and whole
    fresh.unlink()
    first, *lines = manifest.read_bytes().splitlines() or [b""]
    with reading(manifest, "the manifest of a batch"):
        before = json.loads(first)
        last, before = before.pop("versions"), _by_name(before)
    check_same(before, _by_name(here), out, "folder (--out)")
    if lines and not manifest.read_bytes().endswith(b"\n"):  # a process was killed while it wrote
        cut = lines.pop()
        with open(manifest, "ab") as file:
            if alone:
                file.truncate(manifest.stat().st_size - len(cut))
            else:
                file.write(b"\n")
    found = list(_whole(lines))
    last = next((entry["versions"] for entry in reversed(found) if "versions" in entry), last)
    if last != now:
        add_to_manifest(out, [{"versions": now}])
    return [entry for entry in found if "versions" not in entry]


def read_manifest(folder: Path) -> tuple[dict[str, Any], dict[int, dict[str, Any]]]:
    """The first line of a folder of rows, and the last line of every row by its number.

    Raises:
        FileNotFoundError: no manifest. ValueError: a file that is none.
    """
    check_regular(folder / MANIFEST)
    with reading(folder / MANIFEST, "the manifest of a batch"):
        first, *lines = (folder / MANIFEST).read_bytes().splitlines() or [b""]
        return dict(json.loads(first)), {int(e["number"]): e for e in _whole(lines) if "number" in e}


def _whole(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """Entries, without lines that were cut off when a process was killed."""
    for line in lines:
        with suppress(ValueError):
            entry = json.loads(line)
            if isinstance(entry, dict):
                yield entry


def _by_name(asked: Mapping[str, Any]) -> dict[str, Any]:
    """What was asked for under the names that a person knows."""
    return {re.sub("^(about|options)[.]", "", name): value for name, value in flat(asked).items()}


def add_to_manifest(out: Path, entries: Sequence[Mapping[str, Any]]) -> None:
    """Lines of what is done, all at once: other processes may write here too."""
    with open(out / MANIFEST, "ab") as file:
        file.write(b"".join(json.dumps(entry).encode() + b"\n" for entry in entries))


def digest_of(*what: Any) -> str:
    """SHA-256 over data, by which results are known again."""
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()


def _batches(numbers: Sequence[int], rows: Sequence[Row], size: int) -> Iterator[list[int]]:
    """Rows of the same arguments together."""
    groups: dict[object, list[int]] = {}
    for number in numbers:
        groups.setdefault((*sorted(rows[number]), rows[number].get("task")), []).append(number)
    for group in groups.values():
        yield from (group[first : first + size] for first in range(0, len(group), size))


def _called(
    pipe: Any,
    rows: Sequence[Row],
    numbers: list[int],
    seeds: list[int],
    out: Path,
    folder: Path,
    options: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """Entries of the manifest for some rows; where one of them is refused, the others are called one by one."""
    first = rows[numbers[0]]
    columns: dict[str, Any] = {
        key: [_place(key, rows[n][key], folder) for n in numbers] for key in first if key != "task"
    }
    try:
        asked = {**options, "generator": [seeds[number] for number in numbers]}
        result = pipe(task=first.get("task"), **columns, **asked)
    except (ValueError, OSError) as error:
        if len(numbers) == 1:
            refusal = {"number": numbers[0], "arguments": dict(first), "seed": seeds[numbers[0]]}
            return [{**refusal, "error": explain(error)}]
        return [e for number in numbers for e in _called(pipe, rows, [number], seeds, out, folder, options)]
    entries = []
    for place, number in enumerate(numbers):
        entry: dict[str, Any] = {
            "number": number,
            "arguments": dict(rows[number]),
            "seed": seeds[number],
            "words": result.texts[place],
        }
        if result.images is not None and not set(first) - {"task"} <= _READ:
            entry["image"] = f"{number:06d}.png"
            save_image(result.images[place], out / entry["image"])
        entries.append(entry)
    return entries


def _place(key: str, value: str, folder: Path) -> str:
    is_file = key in ("image", "mask_image", "reference") and "://" not in value
    return str(folder / value) if is_file else value
