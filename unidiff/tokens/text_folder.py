"""The files of a text tokenizer looked at before libraries read them: those take much for granted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from unidiff.errors import DamagedFile, check_regular, read_json
from unidiff.schema import check_value

_STARTS = ("token", "special_tokens", "added_tokens", "vocab", "merges", "chat")
_DEEPEST = 64  # nesting of settings; the library walks through them by recursion
_TOKEN = str | dict[str, Any] | None
_FLAG = bool | None
SETTINGS: Mapping[str, Any] = {  # types of the keys of `tokenizer_config.json` that are used
    "tokenizer_class": str | None,
    "name_or_path": str | None,
    "padding_side": Literal["left", "right"] | None,
    "truncation_side": Literal["left", "right"] | None,
    "auto_map": dict[str, Any] | None,
    "added_tokens_decoder": dict[str, Any] | None,
    "additional_special_tokens": list[_TOKEN] | None,
    "extra_special_tokens": list[_TOKEN] | dict[str, Any] | None,
    "model_input_names": list[str] | None,
    **dict.fromkeys([f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")], _TOKEN),
    **dict.fromkeys(("add_bos_token", "add_eos_token", "add_prefix_space", "clean_up_tokenization_spaces"), _FLAG),
    **dict.fromkeys(("split_special_tokens", "do_lower_case", "legacy", "use_fast", "is_local"), _FLAG),
}
ADDED: Mapping[str, Any] = {
    "id": int,
    "content": str,
    **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), bool),
}


def check_tokenizer_folder(folder: str | Path) -> None:
    """Raise `ValueError` unless the files of a text tokenizer are plain files whose settings are of the right types."""
    for path in sorted(Path(folder).iterdir()):
        if path.name.startswith(_STARTS) and not path.is_dir():
            check_regular(path)
    for name, check in _CHECKS.items():
        if (path := Path(folder) / name).exists():
            content = read_json(path, "settings of a text tokenizer")
            try:
                _check_depth(content)
                check(content)
            except ValueError as error:
                raise DamagedFile(f"{str(path)!r} cannot be read as a part of a text tokenizer: {error}") from error


def _check_settings(content: dict[str, Any]) -> None:
    for key in [key for key in SETTINGS if key in content]:
        check_value(content[key], SETTINGS[key], key)
        if isinstance(content[key], dict) and key.endswith("_token"):
            _check_token(content[key], key)
    longest = content.get("model_max_length")
    if longest is not None and (isinstance(longest, bool) or not isinstance(longest, int | float) or not longest > 0):
        raise ValueError(f"model_max_length is {longest!r}; expected a positive number")
    for key, token in (content.get("added_tokens_decoder") or {}).items():
        if not key.isdecimal():
            raise ValueError(f"added_tokens_decoder has {key!r}; expected ids")
        check_value(token, dict[str, Any], f"added_tokens_decoder {key}")
        _check_token(token, f"added_tokens_decoder {key}")


def _check_tokenizer(content: dict[str, Any]) -> None:
    check_value(content.get("added_tokens"), list[dict[str, Any]] | None, "added_tokens")
    for token in content.get("added_tokens") or ():
        _check_token(token, "added_tokens")
    model = content.get("model")
    if isinstance(model, dict) and isinstance(model.get("vocab"), dict):  # a list in other kinds of model
        check_value(model["vocab"], dict[str, int], "model vocab")


_CHECKS: Mapping[str, Callable[[dict[str, Any]], None]] = {
    "tokenizer_config.json": _check_settings,
    "special_tokens_map.json": _check_settings,
    "added_tokens.json": lambda content: check_value(content, dict[str, int], "the file"),
    "tokenizer.json": _check_tokenizer,
}


def _check_token(token: Mapping[str, Any], name: str) -> None:
    for key in [key for key in ADDED if key in token]:
        check_value(token[key], ADDED[key], f"{name} {key}")
    if not token.get("content"):
        raise ValueError(f"{name} has no content")


def _check_depth(value: Any, depth: int = 0) -> None:
    if depth > _DEEPEST:
        raise ValueError(f"it is nested more than {_DEEPEST} deep")
    for inner in value.values() if isinstance(value, dict) else value:
        if isinstance(inner, dict | list):
            _check_depth(inner, depth + 1)


def check_same_kind(folder: Path, written: Path) -> None:
    """Raise `ValueError` where files of another tokenizer would be overwritten."""
    there = [file.name for file in written.iterdir() if (folder / file.name).exists()]
    if there and _kind(folder) != _kind(written):
        raise ValueError(
            f"{str(folder)!r} holds another tokenizer ({there[0]}), which would be lost; name another folder"
        )


def _kind(folder: Path) -> tuple[Any, Any] | None:
    """Class and end-of-text of a saved tokenizer, None where nothing says them."""
    try:
        values = read_json(folder / "tokenizer_config.json", "tokenizer settings")
    except (ValueError, OSError):
        return None
    return values.get("tokenizer_class"), values.get("eos_token")
