"""Plain data against the annotations of a dataclass: every value has its declared type before anything uses it."""

from __future__ import annotations

import inspect
import json
import math
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin

from unidiff.errors import json_name

T = TypeVar("T")
LARGEST = 2**63 - 1
"""Largest whole number that tensors, files and other programs hold."""


@dataclass(frozen=True)
class Between:
    """Bounds of a number, both allowed; inside `Annotated[int, Between(1, 8)]`."""

    low: float
    high: float = LARGEST

    @property
    def words(self) -> str:
        """The bounds as the end of a sentence."""
        if self.high < LARGEST:
            return f" from {self.low:.15g} to {self.high:.15g}"
        return f" of at least {self.low:.15g}" + (", below 2^63" if self.high == LARGEST else "")


# sizes of networks: far above every model there is, and small enough that products of them are numbers that torch holds
Depth = Annotated[int, Between(1, 1024)]
Layers = Annotated[int, Between(0, 1024)]
Width = Annotated[int, Between(1, 2**20)]
Rows = Annotated[int, Between(1, 2**26)]
Index = Annotated[int, Between(0, 2**26)]
Epsilon = Annotated[float, Between(0, 1)]
Positive = Annotated[float, Between(1e-30, 1e30)]


def check_fields(settings: Any, what: str) -> None:
    """Raise `ValueError` unless every field of a dataclass instance holds a value of its annotated type.

    Numbers have to be finite and within 64 bits; `True` is no number; a whole number is a fine `float`. For `__post_init__`.

    Args:
        what: the owner in the message, for instance "sampler text"; one that ends with a dot is joined to the name.
    """
    for name, annotation in field_types(type(settings)).items():  # type: ignore[arg-type]
        check_value(getattr(settings, name), annotation, _owned(what, name))


def check_value(value: Any, annotation: Any, name: str) -> None:
    """Raise `ValueError` unless `value` is of the annotated type; see `check_fields`."""
    if not _fits(value, annotation):
        raise ValueError(f"{name} is {short_value(value)}; expected {describe(annotation)}")


def from_data(schema: type[T], data: Any, what: str) -> T:
    """A dataclass from plain data (JSON or YAML): nested dataclasses are built, lists become tuples where asked for.

    Raises:
        ValueError: no mapping, unknown or missing keys, a value of another type; the message names it.
    """
    if not isinstance(data, Mapping):
        raise ValueError(f"{what} is {short_value(data)}; expected a mapping of settings")
    hints = field_types(schema)  # type: ignore[arg-type]
    if unknown := [str(key) for key in data if key not in hints]:
        raise ValueError(f"{what} has unknown settings {sorted(unknown)}; expected some of {sorted(hints)}")
    needed = {f.name for f in fields(schema) if f.default is MISSING and f.default_factory is MISSING}  # type: ignore[arg-type]
    if missing := sorted(needed - set(data)):
        raise ValueError(f"{what} lacks {missing}")
    own = f"{what}s" if what.split()[-1:] == ["it"] else what  # "its step is 5", but "training's step is 5"
    values = {name: _build(value, hints[name], f"{own} {name}") for name, value in data.items()}
    for name, value in values.items():
        check_value(value, hints[name], f"{own} {name}")
    return schema(**values)


def check_arguments(function: Callable[..., Any], values: Mapping[str, Any], what: str, **types: Any) -> None:
    """Raise `ValueError` unless the values for a function's arguments, by name, have the types that it declares.

    `types`: what an argument has to be, where the function does not say it (well enough). An argument without either has to
    be of its default's type. A list is a fine tuple.
    """
    declared: Any = function.__init__ if isinstance(function, type) else function  # type: ignore[misc]
    hints = {**typing.get_type_hints(declared, include_extras=True), **types}
    for name, parameter in inspect.signature(function).parameters.items():
        annotation = hints.get(name, Any if parameter.default is parameter.empty else type(parameter.default))
        if name in values:
            check_value(_build(values[name], annotation, name), annotation, _owned(what, name))


def _owned(owner: str, name: str) -> str:
    return owner + name if not owner or owner.endswith(".") else f"{owner} {name}"


def describe(annotation: Any) -> str:
    """A type in plain words, for messages."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if annotation is None or annotation is types.NoneType:
        return "nothing (null)"
    if origin is Annotated:
        return describe(parts[0]) + "".join(b.words for b in parts[1:] if isinstance(b, Between))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe(part) for part in parts)
    if origin is typing.Literal:
        return "one of " + ", ".join(repr(part) for part in parts)
    if origin is tuple and parts[-1:] != (Ellipsis,):
        return f"{len(parts)} values, each {describe(parts[0])}" if len(set(parts)) == 1 else f"{len(parts)} values"
    if origin in (tuple, list, Sequence):
        return f"a list, each {describe(parts[0])}"
    if origin in (dict, Mapping):
        return f"a mapping, each value {describe(parts[1])}"
    words = {int: "a whole number", float: "a finite number", bool: "true or false", str: "a text", Any: "anything"}
    return words.get(annotation, f"a {getattr(annotation, '__name__', annotation)}")


def _fits(value: Any, annotation: Any) -> bool:
    origin, parts = get_origin(annotation), get_args(annotation)
    if annotation is Any or isinstance(annotation, TypeVar):
        return True
    if annotation is None or annotation is types.NoneType:
        return value is None
    if origin is Annotated:
        bounds = [bound for bound in parts[1:] if isinstance(bound, Between)]
        return _fits(value, parts[0]) and all(bound.low <= value <= bound.high for bound in bounds)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is typing.Literal:
        return any(type(value) is type(part) and value == part for part in parts)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= LARGEST
    if annotation is float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and (math.isfinite(value) if isinstance(value, float) else abs(value) <= LARGEST)
    if origin is tuple and parts[-1:] != (Ellipsis,):
        return isinstance(value, tuple) and len(value) == len(parts) and all(map(_fits, value, parts))
    if origin in (tuple, list, Sequence):
        kind = Sequence if origin is Sequence else origin
        return isinstance(value, kind) and not isinstance(value, str | bytes) and all(_fits(v, parts[0]) for v in value)
    if origin in (dict, Mapping):
        pairs = isinstance(value, Mapping) and value.items()
        return pairs is not False and all(_fits(k, parts[0]) and _fits(v, parts[1]) for k, v in pairs)
    kind = origin or annotation
    return isinstance(value, kind) if isinstance(kind, type) else True


def _build(value: Any, annotation: Any, what: str) -> Any:
    """Nested dataclasses and tuples from plain data; anything else as it is."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        if value is None and types.NoneType in parts:
            return None
        rest = [part for part in parts if part is not types.NoneType]
        return _build(value, rest[0], what) if len(rest) == 1 else value
    if is_dataclass(annotation) and isinstance(annotation, type):
        return value if isinstance(value, annotation) else from_data(annotation, value, what)
    if origin is tuple and isinstance(value, list | tuple):
        inner = [parts[0]] * len(value) if parts[-1:] == (Ellipsis,) else parts
        return tuple(_build(v, part, what) for v, part in zip(value, inner)) if len(inner) == len(value) else value
    if origin in (list, Sequence) and isinstance(value, list):
        return [_build(v, parts[0], what) for v in value]
    if origin in (dict, Mapping) and isinstance(value, Mapping):
        return {key: _build(v, parts[1], f"{what} {key}") for key, v in value.items()}
    return value


@cache
def field_types(schema: Any) -> dict[str, Any]:
    """The annotations of a dataclass's fields, bounds included."""
    hints = typing.get_type_hints(schema, include_extras=True)
    return {f.name: hints[f.name] for f in fields(schema)}


def short_value(value: object) -> str:
    """A value for a message, on one line, cut where it is long."""
    text = value if isinstance(value, str) else None
    try:
        shown = repr(value) if text is None or len(text) < 80 else repr(text[:77] + "...")
    except (RecursionError, ValueError):  # nested without end, or a number of more digits than Python writes
        return f"{json_name(value)} that is too large to show"
    shown = " ".join(shown.split())
    return shown if len(shown) <= 120 else f"{shown[:100]}... ({json_name(value)})"


_HASH = re.compile(r"[0-9a-f]{40,}")


def differences(old: Mapping[str, Any], new: Mapping[str, Any], names: Iterable[str] | None = None) -> list[str]:
    """`name = old value, here new value` for each of `names` (None: all) whose values are not the same plain data."""
    names = sorted({*old, *new}) if names is None else names
    pairs = [
        (name, *(json.loads(json.dumps([side[name]] if name in side else [])) for side in (old, new))) for name in names
    ]
    return [f"{name} = {_brief(a)}, here {_brief(b)}" for name, a, b in pairs if a != b]


def listed(changed: Sequence[str], most: int = 8) -> str:
    """The first of some differences for a message, and how many more there are."""
    return "; ".join(changed[:most]) + (f"; and {len(changed) - most} more" if len(changed) > most else "")


def check_same(
    old: Mapping[str, Any], new: Mapping[str, Any], folder: Path, setting: str, names: Iterable[str] | None = None
) -> None:
    """Raise ValueError, with both values, where a run is not the one that an earlier one in its `folder` was.

    Args:
        setting: what a person names another folder by. names: what is compared (None: all).
    """
    if changed := differences(old, new, names):
        raise ValueError(
            f"the run in {str(folder)!r} has {listed(changed)}; use the same to continue it, or another {setting}"
        )


def _brief(given: Sequence[Any]) -> str:
    """The value in a list, or that there is none."""
    if not given:
        return "not given"
    text = _HASH.sub(lambda found: f"{found[0][:12]}...", json.dumps(given[0], ensure_ascii=False))
    return text if len(text) <= 60 else f"{text[:57]}..."
