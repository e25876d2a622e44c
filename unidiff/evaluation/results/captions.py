"""Captions by the name of their picture, in every layout that they are kept in, and the words that are counted in them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from unidiff.errors import check_regular, few, plain, read_json, reading
from unidiff.evaluation.results.base import finished_rows

_NAMES = ("image_id", "file_name", "image", "name")
_WORDS = ("caption", "text", "prompt")
_LAYOUTS = (
    "COCO annotations or results, an object of captions by picture, JSON lines with file_name and text, or a folder "
    "with NAME.txt files"
)


class Captions(dict[str, list[str]]):
    """Captions by picture; `other_names` are further names of pictures."""

    def __init__(self, pairs: Iterable[tuple[str, str]], other_names: Mapping[str, str] | None = None) -> None:
        super().__init__()
        self.other_names = dict(other_names or {})
        for name, words in pairs:
            self.setdefault(name, []).append(words)

    def of_picture(self, name: str) -> list[str] | None:
        """The captions of a picture by its path, its file name or that without its ending; None where there are none."""
        place = PurePosixPath(name)
        tried = (name, str(place.with_suffix("")), place.name, place.stem)
        found = (self.get(self.other_names.get(way, way)) for way in tried)
        return next((captions for captions in found if captions), None)


def read_captions(path: Path) -> Captions:
    """The captions of a file or folder.

    Layouts: COCO's annotations and results; `{picture: caption or list}`; JSON lines or a list of objects with a picture
    (image_id, file_name, image, name) and words (caption, text, prompt); a folder with a text file beside or in place of
    each picture, a caption in each line; rows of `unidiff generate --prompts` or `unidiff eval run`.

    Raises:
        FileNotFoundError: nothing there. ValueError: another layout, or no captions.
    """
    captions = _of_folder(path) if path.is_dir() else _of_file(path)
    if not captions:
        raise ValueError(f"{str(path)!r} holds no captions; expected {_LAYOUTS}")
    return captions


def _of_folder(folder: Path) -> Captions:
    if (rows := finished_rows(folder)) is not None:
        if "image" in rows[0]["arguments"]:  # of given pictures words were made
            return Captions((row["arguments"]["image"], row["words"]) for row in rows)
        return Captions((row.get("image", str(row["number"])), _prompt(row)) for row in rows)
    pairs = []
    for file in sorted(folder.rglob("*.txt")):
        with reading(file, "captions in UTF-8"):
            lines = file.read_text(encoding="utf-8-sig").splitlines()
        name = file.relative_to(folder).with_suffix("").as_posix()
        pairs += [(name, line.strip()) for line in lines if line.strip()]
    return Captions(pairs)


def _prompt(row: Mapping[str, Any]) -> str:
    """What a picture was to show; where nothing was asked for, what the model itself says about it."""
    return str(row["arguments"].get("prompt") or row["words"])


def _of_file(path: Path) -> Captions:
    check_regular(path)
    if path.suffix == ".jsonl":
        with reading(path, "JSON lines"):
            lines = path.read_text(encoding="utf-8-sig").splitlines()
            return Captions(_pairs(path, [json.loads(line) for line in lines if line.strip()]))
    data = read_json(path, "captions", (dict, list))
    if isinstance(data, list):
        return Captions(_pairs(path, data))
    if isinstance(data.get("annotations"), list):
        images = data.get("images", [])
        with reading(path, "annotations of COCO"):
            names = {str(image["file_name"]): str(image["id"]) for image in images if "file_name" in image}
        return Captions(_pairs(path, data["annotations"]), names)
    pairs = []
    for name, words in data.items():
        several = words if isinstance(words, list) else [words]
        if not all(isinstance(one, str) for one in several):
            raise ValueError(f"{str(path)!r}: {plain(name)!r} has no caption in words; expected {_LAYOUTS}")
        pairs += [(name, one) for one in several]
    return Captions(pairs)


def _pairs(path: Path, entries: list[Any]) -> Iterator[tuple[str, str]]:
    for number, entry in enumerate(entries, 1):
        names = [entry[key] for key in _NAMES if key in entry] if isinstance(entry, dict) else []
        words = [entry[key] for key in _WORDS if key in entry] if isinstance(entry, dict) else []
        if not names or not words or not isinstance(words[0], str) or not isinstance(names[0], str | int):
            raise ValueError(f"{str(path)!r}: entry {number} has no picture with a caption; expected {_LAYOUTS}")
        yield str(names[0]), words[0]


def paired(made: Captions, against: Captions) -> dict[str, tuple[str, list[str]]]:
    """A caption and its references for every picture that has a caption, in the order of names.

    Raises:
        ValueError: several captions of a picture, or a picture without references.
    """
    found = {}
    missing = [name for name in made if against.of_picture(name) is None]
    if missing:
        raise ValueError(f"{len(missing)} pictures have captions and no references: {few(sorted(missing))}")
    for name in sorted(made):
        if len(made[name]) > 1:
            raise ValueError(f"{plain(name)!r} has {len(made[name])} captions where one is to be scored")
        references = against.of_picture(name)
        assert references is not None
        found[name] = made[name][0], references
    return found


_BRACKETS = {"(": " -lrb- ", ")": " -rrb- ", "[": " -lsb- ", "]": " -rsb- ", "{": " -lcb- ", "}": " -rcb- "}
_PLAIN = str.maketrans(dict(zip("‘’`“”–—…", "'''\"\"-- ", strict=True)) | _BRACKETS)
_JOINED = re.compile(r"\b(?:(can)(not)|(gon|wan)(na)|(got)(ta)|(gim|lem)(me))\b")
_CLITIC = re.compile(r"(?<=[a-z0-9])(n't|'s|'re|'ve|'ll|'d|'m)(?![a-z0-9])")
_TOKEN = re.compile(
    r"""https?://\S+ | -[lr][rsc]b- | @\w+
    | (?:[a-z]\.){2,} | (?:mr|mrs|ms|dr|st|jr|sr|vs|etc|no)\.     # abbreviations keep their dots
    | n't(?!\w) | '(?:cause|s|re|ve|ll|d|m|em)(?!\w)              # clitics, set apart before
    | [^\W_]\w*(?:(?:[-/&.'_] | (?<=\d)[,:](?=\d))\w+)*           # words and numbers
    | [?!]+ | \S""",
    re.VERBOSE,
)
_NO_WORDS = frozenset("'.?!,:-;\"`")


def caption_words(text: str) -> list[str]:
    """Words in small letters without punctuation, near what COCO's tokenizer (a Java program) makes of captions.

    Clitics are words of their own ("man 's", "does n't"); hyphens, numbers and abbreviations stay whole.
    """
    text = _CLITIC.sub(r" \1", _JOINED.sub(_apart, text.lower().translate(_PLAIN)))
    return [token for token in _TOKEN.findall(text) if token not in _NO_WORDS]


def _apart(found: re.Match[str]) -> str:
    return " ".join(filter(None, found.groups()))
