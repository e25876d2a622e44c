"""`<mask>` and `<mask:3>` in texts: the one reader of holes that all pipelines and the command line share."""

from __future__ import annotations

import re
from collections.abc import Sequence

MOST = 4096
"""Tokens of a hole where the model sets no limit of its own."""

_HOLE = re.compile(r" ?<mask(?::([^<>]*))?>")
_MEANT = re.compile(r"<\s*/?\s*mask|\[MASK\]", re.IGNORECASE)
"""What a person who writes a hole may have typed."""


def split_holes(text: str, most: int = MOST, what: str = "text") -> list[str | int]:
    """The words between holes, and for each hole its number of tokens, in order; words without holes are one entry.

    A hole takes the space in front of it with it. Empty strings are left out.

    Args:
        most: tokens that the holes may have. what: the argument, for the message.

    Raises:
        ValueError: `<mask:x>`, `<mask:0>`, `<mask` without its end, `<MASK>`, `[MASK]` and the like, or more than `most`
            hidden tokens in all.
    """
    parts: list[str | int] = []
    place = 0
    for hole in _HOLE.finditer(text):
        count = "1" if hole[1] is None else hole[1].strip()
        if not (count.isascii() and count.isdecimal() and len(count) < 10 and 1 <= int(count) <= most):
            raise ValueError(
                f"{hole[0].strip()!r} is no hole ({what} {short(text)}); write <mask> or <mask:n> with n from 1 to {most} "
                "tokens"
            )
        parts += [_words(text[place : hole.start()], what), int(count)]
        place = hole.end()
    if (total := sum(part for part in parts if isinstance(part, int))) > most:
        raise ValueError(f"{what} {short(text)} hides {total} tokens in all; at most {most} fit")
    return [part for part in [*parts, _words(text[place:], what)] if part != ""]


def has_holes(text: str, what: str = "text") -> bool:
    """Whether a text has holes; errors as of `split_holes`."""
    return any(isinstance(part, int) for part in split_holes(text, what=what))


def all_have_holes(texts: Sequence[str], what: str = "text") -> bool:
    """Whether texts have holes: all or none, since only those without are guided.

    Raises:
        ValueError: some do, or as for `split_holes`.
    """
    holes = [has_holes(text, what) for text in texts]
    if any(holes) and not all(holes):
        raise ValueError(
            f"some {what}s have <mask> holes and some have none, which are decoded apart; run them apart, one call for "
            "each kind"
        )
    return any(holes)


def refuse_holes(texts: Sequence[str], what: str, instead: str) -> None:
    """Raise `ValueError` where a text has holes, well formed or not, that this task would read as letters.

    Args:
        instead: what fills holes.
    """
    for text in texts:
        if found := _MEANT.search(text):
            raise ValueError(
                f"{what} {short(text)} holds {found[0]!r}, but holes are not filled there; {instead}, or leave it out"
            )


def letters_note(texts: Sequence[str]) -> list[str]:
    """A note where a task that takes any text was given what looks like a hole."""
    found = next((match[0] for text in texts if (match := _MEANT.search(text))), None)
    return [] if found is None else [f"{found!r} is read as letters there; infill fills <mask> holes"]


def short(text: str) -> str:
    """A text for a message, cut where it is long."""
    return repr(text if len(text) <= 40 else text[:37] + "...")


def _words(text: str, what: str) -> str:
    if found := _MEANT.search(text):
        raise ValueError(
            f"{what} {short(text.strip())} holds {found[0]!r}, an unfinished <mask> or another spelling of it; write "
            "<mask> or <mask:n>"
        )
    return text
