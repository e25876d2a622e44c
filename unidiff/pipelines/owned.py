"""What a pipeline folder is, and which files in a folder are unidiff's own: nothing of anybody else is ever replaced."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from unidiff.errors import few, plain, read_json, reading
from unidiff.families.checkpoint.load import load_own
from unidiff.files import replacing_folder, resolve_link
from unidiff.models.trained_on import FILE as TRAINED_ON
from unidiff.models.trained_on import read_trained_on
from unidiff.pipelines.card import CARD
from unidiff.pipelines.settings import PipelineSettings
from unidiff.tokens import Vocabulary
from unidiff.tokens.text import TextTokenizer
from unidiff.weights.adapter import ADAPTER_FILES
from unidiff.weights.files import INDEX_ENDING, with_variant
from unidiff.weights.model import CONFIG, WEIGHTS

VOCABULARY = "vocabulary.json"
INDEX = "model_index.json"
PIPELINE_CLASS = "UniDiffPipeline"
CODE = Path("pipeline.py")
CODE_TEXT = f'''"""For `diffusers.DiffusionPipeline.from_pretrained(..., trust_remote_code=True)`, with unidiff installed."""

from unidiff.pipeline import {PIPELINE_CLASS} as {PIPELINE_CLASS}
'''
"""What lies in a pipeline folder as `CODE`; unidiff itself runs no code of folders."""
MODELS, WORDS = ("transformer", "image_tokenizer"), "text_tokenizer"
PARTS, SCHEDULER = (*MODELS, WORDS), "scheduler"
_INDEX_KEYS = {"_class_name", "_diffusers_version", "_name_or_path", "settings", SCHEDULER, *PARTS}
_SHOWN = 6  # names in a message
OWN: Mapping[str, Callable[[Path], bool]] = {
    CODE.name: lambda path: path.is_file() and path.read_text(encoding="utf-8", errors="replace") == CODE_TEXT,
    CARD: lambda path: path.is_file(),  # ours is replaced, a person's stays
}
"""Files beside the parts that may be written over, each with what tells it from a person's."""


def is_pipeline(folder: Path) -> bool:
    """Whether a folder holds a unidiff pipeline, by the class that its index names."""
    path = folder / INDEX
    if not path.is_file():
        return False
    with reading(path, "an index"):
        return f'"{PIPELINE_CLASS}"' in path.read_text(encoding="utf-8-sig", errors="replace")


def read_settings(folder: Path) -> PipelineSettings:
    """Of the index of a unidiff pipeline; `FileNotFoundError` for none, `ValueError` for one of another class."""
    path = folder / INDEX
    if not path.is_file():
        raise FileNotFoundError(
            f"{str(folder)!r} holds no {INDEX}; name a folder written by save_pretrained or by `unidiff pack`"
        )
    index = read_json(path, "an index of a pipeline")
    if (kind := index.get("_class_name")) not in (PIPELINE_CLASS, [CODE.stem, PIPELINE_CLASS]):
        raise ValueError(f"{path} describes a {kind}, not a {PIPELINE_CLASS}; load it with its own library")
    try:
        return PipelineSettings.from_dict(index.get("settings") or {})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def check_target(target: str | Path) -> None:
    """Raise `ValueError` where saving a pipeline to `target` would lose what `save_pretrained` did not write."""
    check_replaceable(target, others_in_pipeline, "pipeline")


def write_folder(target: str | Path, write: Callable[[Path], None]) -> None:
    """Call `write` on an empty folder beside `target`, then put it in place; errors as of `check_target`, and of disks."""
    check_target(target)
    with replacing_folder(target) as temporary:
        write(temporary)
        check_target(target)  # a large model takes minutes to write


def check_replaceable(target: str | Path, others: Callable[[Path], list[str]], what: str) -> None:
    """Raise `ValueError` where replacing `target` would lose something that unidiff did not write as `what`.

    Args:
        others: `others_in_pipeline`, `others_in_model` or `others_in_adapter`. what: for the message, for instance "pipeline".
    """
    place = resolve_link(target)
    if place.exists() and not place.is_dir():
        raise ValueError(f"{str(target)!r} is a file; name a folder to save the {what} in")
    if blocked := next((p for p in place.parents if p.exists() and not p.is_dir()), None):
        raise ValueError(f"{str(target)!r} lies under {str(blocked)!r}, which is a file; name another folder")
    if not place.is_dir():
        return
    if lost := others(place):
        says = f"is not empty and holds no {what}" if lost == entries(place) else f"holds more than a {what}"
        raise ValueError(
            f"{str(target)!r} {says} that unidiff wrote; {few(lost, _SHOWN)} would be lost, so save to a new folder"
        )


def others_in_pipeline(folder: Path) -> list[str]:
    """Entries of a folder that `UniDiffPipeline.save_pretrained` did not write; all where it holds no pipeline."""
    try:
        read_settings(folder)
        known = set(read_json(folder / INDEX)) <= _INDEX_KEYS
    except (ValueError, OSError):
        known = False
    if not known:
        return entries(folder)
    found = []
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.is_symlink() and path.name in PARTS:
            inside = _others_in_words(path) if path.name == WORDS else others_in_model(path, exported=False)
            found += [f"{path.name}/{name}" for name in inside]
        elif path.is_dir() and not path.is_symlink() and path.name == SCHEDULER:
            found += [f"{path.name}/{name}" for name in _unknown(path, {"scheduler_config.json"})]
        elif path.is_symlink() or not (path.name == INDEX or (path.name in OWN and OWN[path.name](path))):
            found.append(_shown(path))
    return found


def others_in_model(folder: Path, exported: bool = True) -> list[str]:
    """Entries of a folder that no `save_pretrained` of a model wrote (nor training, with `exported`); all without a model."""
    try:
        variant = _variant_in(folder)
        with reading(folder, "a model"):
            # names and shapes of the weights are those that the config asks for
            load_own(folder, device="meta", variant=variant)
        known = {CONFIG, *(_notes_of_a_run(folder) if exported else ())}
        single, listed = (with_variant(f"{WEIGHTS}.safetensors{end}", variant) for end in ("", INDEX_ENDING))
        index = folder / listed
        if (folder / single).is_file():
            known.add(single)
        else:
            known |= {index.name, *read_json(index)["weight_map"].values()}
    except (ValueError, OSError):
        return entries(folder)
    return _unknown(folder, known)


def others_in_adapter(folder: Path) -> list[str]:
    """Entries of a folder that training did not write as an adapter; all where it holds none."""
    if not all((folder / name).is_file() for name in ADAPTER_FILES):
        return entries(folder)
    return _unknown(folder, set(ADAPTER_FILES))


def entries(folder: Path) -> list[str]:
    """Names of everything in a folder, hidden files too; those of folders end with a slash."""
    return [_shown(path) for path in sorted(folder.iterdir())]


def _notes_of_a_run(folder: Path) -> set[str]:
    found = set()
    with suppress(ValueError, OSError):
        Vocabulary.from_dict(read_json(folder / VOCABULARY))
        found.add(VOCABULARY)
    with suppress(ValueError, OSError):
        read_trained_on(folder)
        found.add(TRAINED_ON)
    return found


def _variant_in(folder: Path) -> str | None:
    """The variant of a model's weights; None where there are plain ones, or several variants."""
    found = {m[1] for path in folder.glob(f"{WEIGHTS}.*") if (m := re.fullmatch(rf"{WEIGHTS}\.(\w+)\.\w+", path.name))}
    found |= {m[1] for path in folder.glob(f"{WEIGHTS}.*") if (m := re.search(r"\.index\.(\w+)\.json$", path.name))}
    plain_ones = (folder / f"{WEIGHTS}.safetensors{end}" for end in ("", INDEX_ENDING))
    return None if len(found) != 1 or any(path.is_file() for path in plain_ones) else found.pop()


def _others_in_words(folder: Path) -> list[str]:
    try:
        words = TextTokenizer.from_pretrained(folder).tokenizer
    except (ValueError, OSError):
        return entries(folder)
    known = {"tokenizer.json", "tokenizer_config.json"} | ({"chat_template.jinja"} if words.chat_template else set())
    if not words.is_fast:
        known |= {"added_tokens.json", *words.vocab_files_names.values()}
    return _unknown(folder, known)


def _unknown(folder: Path, known: set[str]) -> list[str]:
    fine = lambda path: path.name in known and path.is_file() and not path.is_symlink()  # noqa: E731
    return [_shown(path) for path in sorted(folder.iterdir()) if not fine(path)]


def _shown(path: Path) -> str:
    return plain(path.name) + ("/" if path.is_dir() and not path.is_symlink() else "")
