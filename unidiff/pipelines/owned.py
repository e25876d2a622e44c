"""What in a folder unidiff did not write: a folder is replaced only where that is nothing."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from unidiff.errors import few, plain, read_json, reading
from unidiff.families.checkpoint.load import load_own
from unidiff.files import resolve_link
from unidiff.models.trained_on import FILE as TRAINED_ON
from unidiff.models.trained_on import read_trained_on
from unidiff.pipelines.settings import PipelineSettings
from unidiff.tokens import Vocabulary
from unidiff.tokens.text import TextTokenizer
from unidiff.weights.model import CONFIG, WEIGHTS

VOCABULARY = "vocabulary.json"
INDEX = "model_index.json"
PIPELINE_CLASS = "UniDiffPipeline"
MODELS, WORDS = ("transformer", "image_tokenizer"), "text_tokenizer"
PARTS = (*MODELS, WORDS)
_INDEX_KEYS = {"_class_name", "_diffusers_version", "_name_or_path", "settings", *PARTS}
_SHOWN = 6  # names in a message


def check_replaceable(target: str | Path, others: Callable[[Path], list[str]], what: str) -> None:
    """Raise `ValueError` where replacing `target` would lose something that unidiff did not write as `what`.

    Args:
        others: `others_in_pipeline` or `others_in_model`.
        what: for the message, for instance "pipeline".

    Raises:
        ValueError: a file, or a folder with other things; the message names them.
        OSError: a folder that cannot be read, or links that go round in circles.
    """
    place = resolve_link(target)
    if place.exists() and not place.is_dir():
        raise ValueError(f"{str(target)!r} is a file; name a folder to save the {what} in")
    if blocked := next((p for p in place.parents if p.exists() and not p.is_dir()), None):
        raise ValueError(f"{str(target)!r} lies under {str(blocked)!r}, which is a file; name another folder")
    if not place.is_dir():
        return
    everything = entries(place)
    if not (lost := others(place)):
        return
    says = f"is not empty and holds no {what}" if lost == everything else f"holds more than a {what}"
    raise ValueError(
        f"{str(target)!r} {says} that unidiff wrote; {few(lost, _SHOWN)} would be lost, so save to a new folder"
    )


def others_in_pipeline(folder: Path) -> list[str]:
    """Entries of a folder that `UniDiffPipeline.save_pretrained` did not write; all where it holds no pipeline."""
    if not _is_index(folder / INDEX):
        return entries(folder)
    found = []
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.is_symlink() and path.name in PARTS:
            inside = _others_in_words(path) if path.name == WORDS else others_in_model(path, exported=False)
            found += [f"{path.name}/{name}" for name in inside]
        elif path.name != INDEX or path.is_symlink():
            found.append(_shown(path))
    return found


def others_in_model(folder: Path, exported: bool = True) -> list[str]:
    """Entries of a folder that no `save_pretrained` of a model wrote; all where it holds no model.

    Args:
        exported: what a training run puts beside its model is no stranger.
    """
    try:
        with reading(folder, "a model"):
            load_own(folder, device="meta")  # names and shapes of the weights are those that the config asks for
        known = {CONFIG, *(_notes_of_a_run(folder) if exported else ())}
        single, index = f"{WEIGHTS}.safetensors", folder / f"{WEIGHTS}.safetensors.index.json"
        if (folder / single).is_file():
            known.add(single)
        else:
            known |= {index.name, *read_json(index)["weight_map"].values()}
    except (ValueError, OSError):
        return entries(folder)
    return _unknown(folder, known)


def entries(folder: Path) -> list[str]:
    """Names of everything in a folder, hidden files too; those of folders end with a slash."""
    return [_shown(path) for path in sorted(folder.iterdir())]


def _notes_of_a_run(folder: Path) -> set[str]:
    readers = {
        VOCABULARY: lambda: Vocabulary.from_dict(read_json(folder / VOCABULARY)),
        TRAINED_ON: lambda: read_trained_on(folder),
    }
    found = set()
    for name, read in readers.items():
        with suppress(ValueError, OSError):
            read()
            found.add(name)
    return found


def _others_in_words(folder: Path) -> list[str]:
    try:
        words = TextTokenizer.from_pretrained(folder).tokenizer
    except (ValueError, OSError):
        return entries(folder)
    known = {"tokenizer.json", "tokenizer_config.json"} | ({"chat_template.jinja"} if words.chat_template else set())
    if not words.is_fast:
        known |= {"added_tokens.json", *words.vocab_files_names.values()}
    return _unknown(folder, known)


def _is_index(path: Path) -> bool:
    try:
        index = read_json(path, "an index")
        PipelineSettings.from_dict(index.get("settings") or {})
    except (ValueError, OSError):
        return False
    return index.get("_class_name") == PIPELINE_CLASS and set(index) <= _INDEX_KEYS


def _unknown(folder: Path, known: set[str]) -> list[str]:
    fine = lambda path: path.name in known and path.is_file() and not path.is_symlink()  # noqa: E731
    return [_shown(path) for path in sorted(folder.iterdir()) if not fine(path)]


def _shown(path: Path) -> str:
    return plain(path.name) + ("/" if path.is_dir() and not path.is_symlink() else "")
