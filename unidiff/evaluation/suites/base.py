"""What a public benchmark is here: the calls that its prompts ask for, and the files that its scorer expects.

unidiff makes pictures and answers; the scoring is the benchmark's own program, so that figures compare with published ones.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from unidiff.errors import check_regular, reading
from unidiff.evaluation.benchmark.measure import model_hash
from unidiff.files import check_writable, locked, replace_text, replacing_folder
from unidiff.pipelines.batch import MANIFEST, Row, read_manifest, run_rows
from unidiff.registry import Registry
from unidiff.schema import check_value

RESULTS = "rows"  # folder of results as they are made


class Result(NamedTuple):
    """What came out of a row: a file with a picture, if one was drawn, and words."""

    picture: Path | None
    words: str


Export = Callable[[Path, Sequence[Result], Path], None]
"""Writes the layout of a scorer: (prompts, a result for each row, a new empty folder)."""


@dataclass(frozen=True)
class Suite:
    """A benchmark.

    Attributes:
        name: on the command line.
        rows: the calls for a file (or folder) of prompts as the benchmark publishes it; names of pictures are relative to
            the folder that holds them.
        export: see `Export`. scorer: how to score what is written, one sentence.
        reads: whether it is about given pictures.
        own_pictures: (prompts, folder of the run) -> the folder of these pictures, where the prompts come with them; else
            it has to be named.
    """

    name: str
    rows: Callable[[Path], list[Row]]
    export: Export
    scorer: str
    reads: bool = False
    own_pictures: Callable[[Path, Path], Path] | None = None

    @property
    def needs_pictures(self) -> bool:
        """Whether the folder of the pictures has to be named."""
        return self.reads and self.own_pictures is None


SUITES: Registry[Suite] = Registry(
    "suites", "unidiff.evaluation.suites", lambda value: value.name if isinstance(value, Suite) else None
)


def run_benchmark(
    suite: Suite,
    pipe: Any,
    prompts: Path,
    out: Path,
    pictures: Path | None = None,
    about: Mapping[str, Any] | None = None,
    **options: Any,
) -> Path | None:
    """Decode the rows of a benchmark and write what its scorer reads.

    Killed and started again it goes on, with the same files in the end; several processes share the rows.

    Args:
        prompts: the benchmark's own file. pictures: folder of the pictures that it asks about.
        out: gets `rows` (a picture for each row and `manifest.jsonl`: first the hash of the model, settings, options and
            versions, then arguments, seed and words of each row), and `scorer`.
        about: what else must be the same to go on in `out`.
        options: of `run_rows`, which also names the processes.

    Returns:
        The folder for the scorer; None where rows of other processes are missing.

    Raises:
        ValueError: prompts in another layout, a task that the model cannot do, rows that were refused, a missing folder of
            pictures, or a folder that holds something else.
    """
    rows, folder = asked_rows(suite, prompts, out, pictures), out / "scorer"
    for task in dict.fromkeys(row["task"] for row in rows):
        pipe.layout.need(task)
    options |= {"resize": True} if suite.reads else {}  # a benchmark's pictures have all sizes
    about = {**(about or {}), "benchmark": suite.name, "model_hash": model_hash(pipe), "settings": own_settings(pipe)}
    if suite.own_pictures is not None:
        pictures = suite.own_pictures(prompts, out)
    refused = run_rows(pipe, rows, out / RESULTS, pictures or prompts.absolute().parent, about=about, **options)
    if refused:
        first = next(entry for _, entry in sorted(read_manifest(out / RESULTS)[1].items()) if "error" in entry)
        raise ValueError(
            f"{refused} rows were refused, row {first['number']} because {first['error']}; mend them and run again "
            f"({str(out / RESULTS / MANIFEST)!r} has all reasons)"
        )
    entries = read_manifest(out / RESULTS)[1]
    found = {number: _result(out / RESULTS, entry) for number, entry in entries.items() if "error" not in entry}
    if len(found) < len(rows):
        return None
    with locked(out, "benchmark"):
        if not folder.exists():  # a scorer's own files may lie in it by now
            with replacing_folder(folder) as fresh:
                suite.export(prompts, [found[number] for number in range(len(rows))], fresh)
    return folder


def asked_rows(suite: Suite, prompts: Path, out: Path, pictures: Path | None = None) -> list[Row]:
    """The rows of a benchmark, once all is checked that can be without a model; arguments and errors as of `run_benchmark`."""
    if suite.needs_pictures != (pictures is not None):
        none = "has its pictures beside its questions" if suite.reads else "is drawn from words"
        need = "asks about pictures; name their folder" if suite.needs_pictures else f"{none}; leave pictures out"
        raise ValueError(f"{suite.name} {need} (--pictures)")
    rows = suite.rows(prompts)
    if not rows:
        raise ValueError(
            f"{str(prompts)!r} holds no prompts of {suite.name}; name the file that the benchmark publishes"
        )
    check_writable(out / RESULTS / MANIFEST, "--out")
    if (out / "scorer").exists() and not (out / RESULTS / MANIFEST).exists():
        raise ValueError(
            f"{str(out / 'scorer')!r} is of a run whose rows are gone; remove it, or name another folder (--out)"
        )
    check_no_rows(out)
    return rows


def check_no_rows(out: Path) -> None:
    """Raise `ValueError` where a folder holds rows of another command, which does not put them into a folder of their own."""
    if (out / MANIFEST).exists():
        raise ValueError(f"{str(out)!r} holds rows of `unidiff generate --prompts`; name another folder (--out)")


def own_settings(pipe: Any) -> dict[str, Any]:
    """Settings that a pipeline brings for its decodes, as data: what an option was not given for."""
    if hasattr(pipe, "settings"):
        kept = pipe.settings.to_dict()
        return {name: kept[name] for name in ("samplers", "num_candidates") if name in kept}
    return {"family": pipe.layout.family}


def _result(folder: Path, entry: Mapping[str, Any]) -> Result:
    return Result(folder / entry["image"] if "image" in entry else None, entry["words"])


def put_picture(result: Result, path: Path) -> None:
    """A result's picture under another name: a second name of the same file where the disk can do that."""
    assert result.picture is not None
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(result.picture, path)
    except OSError:
        shutil.copyfile(result.picture, path)


def read_lines(path: Path, keys: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The objects of a JSON lines file, each with at least these keys. `ValueError`: something else."""
    check_regular(path)
    with reading(path, "JSON lines"):
        lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        if line.strip():
            with reading(path, f"JSON lines (line {number})"):
                entry = json.loads(line)
            yield _with_keys(entry, keys, f"{path}, line {number}")


def read_object(path: Path, keys: Sequence[str] = ()) -> dict[str, Any]:
    """A JSON file that holds one object with at least these keys. `ValueError`: something else."""
    check_regular(path)
    with reading(path, "JSON"):
        data = json.loads(path.read_text(encoding="utf-8"))
    return _with_keys(data, keys, str(path))


def _with_keys(entry: Any, keys: Sequence[str], place: str) -> dict[str, Any]:
    check_value(entry, dict[str, Any], place)
    if missing := [key for key in keys if key not in entry]:
        raise ValueError(f"{place} has no {missing[0]!r}; expected the benchmark's own file, with {', '.join(keys)}")
    return dict(entry)


def check_entries(path: Path, entries: Sequence[Mapping[str, Any]], kinds: Mapping[str, type]) -> None:
    """Raise `ValueError` unless every entry has values of these kinds."""
    for number, entry in enumerate(entries, 1):
        for key, kind in kinds.items():
            if not isinstance(entry.get(key), kind) or isinstance(entry.get(key), bool):
                raise ValueError(f"{str(path)!r}: entry {number} has no {key!r} of kind {kind.__name__}")


def with_choices(words: str, choices: Mapping[str, str]) -> str:
    """A question of which one of several answers, by letter, is right."""
    lines = "\n".join(f"{letter}. {choice}" for letter, choice in choices.items())
    return f"{words}\n{lines}\nAnswer with the letter of the right option."


def write_lines(path: Path, entries: Sequence[Mapping[str, Any]]) -> None:
    """JSON lines."""
    replace_text(path, "".join(json.dumps(entry) + "\n" for entry in entries))
