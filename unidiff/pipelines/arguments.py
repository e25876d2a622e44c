"""Arguments of the task methods: known names, the right types and useful sizes, checked before anything is computed."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from unidiff.schema import short_value
from unidiff.words import refuse_holes

MOST_ROWS = 10_000
"""Rows of one call: results are kept in memory, so more than that is more likely a slip of the hand."""
_FILLED_BY = "generate, inpaint or infill fill <mask> holes, where the model can"


def check_keywords(
    method: Callable[..., Any], given: Iterable[str], options: Iterable[str] = (), owner: type | None = None
) -> None:
    """Refuse keyword arguments that a public method does not have.

    Args:
        method: its own arguments count, besides `options`, which it takes as `**options`.
        owner: the class whose method it is, where it is inherited.

    Raises:
        TypeError: as Python does, with the method's name and the nearest name that it has.
    """
    known = [*own_arguments(method), *options]
    for name in given:
        if name not in known:
            meant = [other for other in _ELSEWHERE.get(name, ()) if other in known]
            near = (
                meant
                or difflib.get_close_matches(name, known, 1, 0.5)
                or [n for n in known if name.lower() in n.lower()]
            )
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(known)}"
            called = f"{owner.__name__}.{method.__name__}" if owner else method.__qualname__
            raise TypeError(f"{called}() has no argument {name!r}; {hint}")


_ELSEWHERE = {  # as other programs call them
    "seed": ("generator",),
    "seeds": ("generator",),
    "num_inference_steps": ("steps",),
    "num_steps": ("steps",),
    "cfg_scale": ("guidance_scale",),
    "cfg": ("guidance_scale",),
    "max_new_tokens": ("max_text_tokens",),
    "callback": ("callback_on_step_end",),
    "mask": ("mask_image",),
    "prompt": ("text", "messages", "question"),
    "text": ("prompt", "messages", "question"),
    "question": ("prompt", "messages"),
    "torch_dtype": ("dtype",),
}


def own_arguments(method: Callable[..., Any]) -> list[str]:
    """Names of a method's arguments, without `self` and `**options`."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [name for name, p in inspect.signature(method).parameters.items() if p.kind in kinds and name != "self"]


def texts_of(value: Any, what: str, empty: bool = False, holes: bool = False) -> list[str]:
    """One text or several as a list of strings.

    Args:
        what: the argument, for the message. empty: whether a text without words is fine. holes: whether it may have holes.

    Raises:
        ValueError: an empty list, something else than a text, a text without words or with holes; the message says which.
    """
    several = isinstance(value, list | tuple)
    texts = list(value) if several else [value]
    if not texts:
        raise ValueError(f"the list of {what}s is empty; give at least one")
    for number, text in enumerate(texts):
        where = f" (number {number + 1} of {len(texts)})" if len(texts) > 1 else ""
        if not isinstance(text, str):
            expected = "a string" if several else "a string, or a list of them"
            raise ValueError(f"the {what} is {kind_of(text)}{where}; expected {expected}")
        if not text.strip() and not empty:
            raise ValueError(f"the {what} is empty{where}; write at least one word")
        if (bad := next((c for c in text if "\ud800" <= c <= "\udfff"), None)) is not None:
            raise ValueError(f"the {what} holds the lone surrogate {bad!r}{where}, which is no character; leave it out")
    if not holes:
        refuse_holes(texts, what, _FILLED_BY)
    return texts


def whole(value: Any, name: str, least: int, most: int, note: str = "") -> int:
    """`value` where it is a whole number from `least` to `most`; else `ValueError`."""
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ValueError(f"{name} is {short(value)}; expected a whole number from {least} to {most}{note}")
    return value


def flag(value: Any, name: str) -> bool:
    """`value` where it is True or False; else `ValueError`."""
    if type(value).__name__ not in ("bool", "bool_"):  # numpy's is one
        raise ValueError(f"{name} is {short(value)}; expected True or False")
    return bool(value)


def repeated(items: Sequence[Any], count: Any) -> list[Any]:
    """Each item `count` (`num_images_per_prompt`) times in a row.

    Raises:
        ValueError: a count that is no whole number of at least 1, or more than `MOST_ROWS` rows.
    """
    whole(count, "num_images_per_prompt", 1, MOST_ROWS)
    check_rows(len(items) * count)
    return [item for item in items for _ in range(count)]


def check_rows(rows: int) -> None:
    """Raise `ValueError` for more rows than `MOST_ROWS`."""
    if rows > MOST_ROWS:
        raise ValueError(
            f"this call would decode {rows} rows (num_images_per_prompt and num_candidates multiply); expected at most "
            f"{MOST_ROWS}, so make several calls"
        )


def one_of(value: Any, name: str, allowed: Sequence[str], other: str = "") -> None:
    """Raise `ValueError` unless `value` is one of the names.

    Args:
        other: what may stand there besides, for the message.
    """
    if not isinstance(value, str) or value not in allowed:
        near = difflib.get_close_matches(value, allowed, 1) if isinstance(value, str) else []
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"{name} is {short(value)}; expected one of {', '.join(allowed)}{hint or other}")


def kind_of(value: Any) -> str:
    """What a value is, for messages: `an int`, `None`."""
    if value is None:
        return "None"
    name = type(value).__name__
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def short(value: Any) -> str:
    """A value for a message: what it is where it is long or no plain value."""
    if value is None or isinstance(value, str | int | float | bool | complex):
        return short_value(value)
    return kind_of(value)
