"""Files of answers, in the layouts that `unidiff eval run` writes and the scorers of VQAv2, POPE and MMMU read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unidiff.errors import check_regular, read_json, reading
from unidiff.evaluation.results.base import scorer_folder
from unidiff.evaluation.suites.base import read_lines


def answers_file(path: Path, pattern: str) -> Path:
    """The file that `pattern` finds in a folder of `unidiff eval run`, or `path` itself where it is a file.

    Raises:
        FileNotFoundError: nothing there. ValueError: a folder with none or several of them, or a run that is not finished.
    """
    if not path.is_dir():
        check_regular(path)
        return path
    found = sorted(path.glob(pattern)) or sorted(scorer_folder(path).glob(pattern))
    if len(found) != 1:
        raise ValueError(f"{str(path)!r} holds {len(found)} files of answers ({pattern}); name the file itself")
    return found[0]


def read_entries(path: Path, kinds: Mapping[str, type], key: str | None = None) -> list[dict[str, Any]]:
    """The objects of a JSON list, JSON lines, or of the list that an object holds under `key`.

    Args:
        kinds: the values that each must have.

    Raises:
        ValueError: another layout, or a value that is missing or of another kind.
    """
    with reading(path, "JSON"):
        start = path.read_text(encoding="utf-8-sig")[:4096].lstrip()
    if key is None and not start.startswith("["):
        entries = list(read_lines(path, tuple(kinds)))
    else:
        data = read_json(path, "answers", (dict, list))
        listed = data.get(key) if isinstance(data, dict) else data
        if not isinstance(listed, list):
            raise ValueError(f"{str(path)!r} holds no list{f' under {key!r}' if key else ''}; name another file")
        entries = listed
    for number, entry in enumerate(entries, 1):
        for name, kind in kinds.items():
            if not isinstance(entry, dict) or not isinstance(entry.get(name), kind):
                raise ValueError(f"{str(path)!r}: entry {number} has no {name!r} of kind {kind.__name__}")
    if not entries:
        raise ValueError(f"{str(path)!r} is empty; it should have a line for every question")
    return entries


def read_mmmu(path: Path) -> list[dict[str, Any]]:
    """Questions with responses of MMMU: of `CATEGORY/output.json` in a folder, each with its `category`.

    Raises:
        FileNotFoundError: no such folder. ValueError: no such files in it, or other things in them.
    """
    files = sorted(path.glob("*/output.json")) or sorted(scorer_folder(path).glob("*/output.json"))
    if not files:
        raise FileNotFoundError(f"{str(path)!r} has no CATEGORY/output.json, as `unidiff eval run mmmu` writes them")
    kinds = {"id": str, "question_type": str, "response": str, "all_choices": list, "index2ans": dict}
    return [{**entry, "category": file.parent.name} for file in files for entry in read_entries(file, kinds)]
