"""Arguments of the task methods: known names, the right types and useful sizes, checked before anything is computed."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np

from unidiff.decoding import CacheConfig, SamplerConfig
from unidiff.decoding.cache.config import CACHES
from unidiff.schema import short_value

P = ParamSpec("P")
S = TypeVar("S")
T = TypeVar("T")

OUTPUT_TYPES = ("pil", "pt", "np", "codes")
MOST_ROWS = 10_000
"""Rows of one call: results are kept in memory, so more than that is more likely a slip of the hand."""
MOST_TOKENS = 4096
"""Tokens to write in one row where the model sets no limit of its own."""


def task_method(
    options: Iterable[str],
) -> Callable[[Callable[Concatenate[S, P], T]], Callable[Concatenate[S, P], T]]:
    """A task of a pipeline: names and types of its arguments are checked before it begins.

    Args:
        options: keyword arguments that it takes as `**options`, besides its own.
    """

    def decorate(method: Callable[Concatenate[S, P], T]) -> Callable[Concatenate[S, P], T]:
        signature = inspect.signature(method)

        @wraps(method)
        def call(self: S, *args: P.args, **kwargs: P.kwargs) -> T:
            check_keywords(method, kwargs, options)
            try:
                given = signature.bind(self, *args, **kwargs).arguments
            except TypeError:
                given = {}  # the call itself says what is missing
            check_types({**given, **kwargs})
            return method(self, *args, **kwargs)

        call.arguments = (*_own(method), *options)  # type: ignore[attr-defined]  # for the command line
        return call

    return decorate


def check_keywords(method: Callable[..., Any], given: Iterable[str], options: Iterable[str] = ()) -> None:
    """Refuse keyword arguments that a public method does not have.

    Args:
        method: its own arguments count, besides `options`, which it takes as `**options`.

    Raises:
        TypeError: as Python does, with the method's name and the nearest name that it has.
    """
    known = [*_own(method), *options]
    for name in given:
        if name not in known:
            meant = [other for other in _ELSEWHERE.get(name, ()) if other in known]
            near = (
                meant
                or difflib.get_close_matches(name, known, 1, 0.5)
                or [n for n in known if name.lower() in n.lower()]
            )
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(known)}"
            raise TypeError(f"{method.__qualname__}() has no argument {name!r}; {hint}")


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


def _own(method: Callable[..., Any]) -> list[str]:
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [name for name, p in inspect.signature(method).parameters.items() if p.kind in kinds and name != "self"]


def texts_of(value: Any, what: str, empty: bool = False) -> list[str]:
    """One text or several as a list of strings.

    Args:
        what: the argument, for the message. empty: whether a text without words is fine.

    Raises:
        ValueError: an empty list, something else than a text, or a text without words; the message says which.
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
    return texts


def whole(value: Any, name: str, least: int, most: int, note: str = "") -> int:
    """`value` where it is a whole number from `least` to `most`; else `ValueError`."""
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ValueError(f"{name} is {_short(value)}; expected a whole number from {least} to {most}{note}")
    return value


def repeated(items: Sequence[Any], count: Any) -> tuple[list[Any], int]:
    """Each item `count` (`num_images_per_prompt`) times in a row, and the count.

    Raises:
        ValueError: a count that is no whole number of at least 1, or more than `MOST_ROWS` rows.
    """
    whole(count, "num_images_per_prompt", 1, MOST_ROWS)
    check_rows(len(items) * count)
    return [item for item in items for _ in range(count)], count


def check_rows(rows: int) -> None:
    """Raise `ValueError` for more rows than `MOST_ROWS`."""
    if rows > MOST_ROWS:
        raise ValueError(
            f"this call would decode {rows} rows (num_images_per_prompt and num_candidates multiply); expected at most "
            f"{MOST_ROWS}, so make several calls"
        )


def longest_of(max_text_tokens: Any, default: int, most: int = MOST_TOKENS) -> int:
    """`max_text_tokens`, or `default` for None; `ValueError` where it is no whole number from 1 to `most`."""
    return default if max_text_tokens is None else whole(max_text_tokens, "max_text_tokens", 1, most)


def check_types(given: Mapping[str, Any]) -> None:
    """Raise `ValueError` for an argument of a task of a type or size that nobody can mean.

    Texts, pictures and seeds are checked where they are read, the numbers of a decode by `SamplerConfig`.
    """
    for name in _FLAGS & set(given):
        if not isinstance(given[name], bool | np.bool_):
            raise ValueError(f"{name} is {_short(given[name])}; expected True or False")
    for name in _COUNTS & set(given):
        if given[name] is not None:
            whole(given[name], name, 1, MOST_ROWS)
    if given.get("max_text_tokens") is not None and given.get("text") is not None:
        raise ValueError("max_text_tokens is for texts of unknown length, but text says its own; leave one of them out")
    for name, (fits, expected) in _OBJECTS.items():
        if given.get(name) is not None and not fits(given[name]):
            raise ValueError(f"{name} is {_short(given[name])}; expected {expected}")
    if isinstance(cache := given.get("cache"), str) or not isinstance(cache, CacheConfig | Mapping | None):
        one_of(
            cache, "cache", ("auto", *CACHES), " or a CacheConfig (for a policy object of your own there is policy=)"
        )
    if "output_type" in given:
        one_of(given["output_type"], "output_type", OUTPUT_TYPES)


_FLAGS = {"resize", "paste_back", "record_trajectory"}
_COUNTS = {"steps", "num_candidates", "num_images_per_prompt"}
_OBJECTS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "sampler": (lambda value: isinstance(value, SamplerConfig), "a SamplerConfig"),
    "policy": (
        lambda value: not isinstance(value, type) and callable(getattr(value, "start", None)),
        "a cache policy object, for instance DualCache()",
    ),
    "callback_on_step_end": (callable, "a function of (pipe, step, t, tensors)"),
    "graphs": (lambda value: isinstance(value, bool) or callable(value), "True, False or a Record"),
}


def one_of(value: Any, name: str, allowed: Sequence[str], other: str = "") -> None:
    """Raise `ValueError` unless `value` is one of the names.

    Args:
        other: what may stand there besides, for the message.
    """
    if not isinstance(value, str) or value not in allowed:
        near = difflib.get_close_matches(value, allowed, 1) if isinstance(value, str) else []
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"{name} is {_short(value)}; expected one of {', '.join(allowed)}{hint or other}")


def kind_of(value: Any) -> str:
    """What a value is, for messages: `an int`, `None`."""
    if value is None:
        return "None"
    name = type(value).__name__
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def _short(value: Any) -> str:
    """A value for a message: what it is where it is long or no plain value."""
    if value is None or isinstance(value, str | int | float | bool | complex):
        return short_value(value)
    return kind_of(value)
