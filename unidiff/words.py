"""What people write: texts with `<mask>` and `<mask:3>` for hidden tokens, and words that a model was never taught.

A model whose text tokenizer carries a list of known words (`TextTokenizer.known_words`) was trained on these and no others;
models of free text have no list, and only words that their tokenizer has no ids for are reported.

This module imports no torch, so that the command line can look at its texts at once.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING

from unidiff.errors import few

if TYPE_CHECKING:
    from unidiff.tokens.text import TextTokenizer

MOST_TOKENS = 4096
"""Tokens of a hole where the model sets no limit of its own."""

_HOLE = re.compile(r" ?<mask(?::([^<>]*))?>")
_MEANT = re.compile(r"<\s*/?\s*mask|\[MASK\]", re.IGNORECASE)
"""What a person who writes a hole may have typed."""
# words, and signs that do more than part them: pictures, #, /
_WORD = re.compile(r"[^\W_]+(?:[-'\u2019][^\W_]+)*|(?:[^\w\s.,;:!?\"'()\u2010-\u2027-]|_)")
_LISTED = 8  # words that a message lists


class UnknownWords(UserWarning):
    """The model draws or answers something else than these words say."""


def split_holes(text: str, most: int = MOST_TOKENS, what: str = "text") -> list[str | int]:
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


def words_of(text: str) -> list[str]:
    """The words of a text in order, without the punctuation of sentences."""
    return _WORD.findall(text)


def between_holes(texts: Sequence[str]) -> list[str]:
    """The words of texts, without their holes and the signs between two of them; errors as of `split_holes`."""
    parts = [split_holes(text) for text in texts]
    return [part for row in parts for part in row if isinstance(part, str) and (len(row) == 1 or words_of(part))]


def unknown_words(texts: Iterable[str], tokenizer: TextTokenizer) -> list[str]:
    """Words that the model does not know, each once, in the order of the texts."""
    known = tokenizer.known_words
    found = {word: None for text in texts for word in words_of(text)}
    if known is not None:
        return [word for word in found if word not in known]
    unknown = tokenizer.tokenizer.unk_token_id
    if unknown is None:
        return []
    return [word for word in found if unknown in tokenizer.encode(word)]


def note_on(words: Sequence[str], known: Collection[str] | None) -> str:
    """One sentence about words that a model does not know."""
    small = [word for word in words if known is not None and word.lower() in known]
    new = [word for word in words if word not in small]
    parts = []
    if new:
        parts.append(f"the model does not know {_listed(new)}, so the result may show something else")
    if small:
        parts.append(f"the model knows {_listed(small)} in small letters only")
    if new and known is not None:
        parts.append("`unidiff info` lists all that it knows")
    return "; ".join(parts)


def _listed(words: Sequence[str]) -> str:
    shown = [repr(word if len(word) <= 40 else word[:37] + "...") for word in words]
    return f"the word{'s' if len(words) > 1 else ''} {few(shown, _LISTED)}"


def notes_on(texts: Iterable[str], tokenizer: TextTokenizer) -> list[str]:
    """Notes for a result, also given as a warning of Python's, which shows the same one once."""
    texts, known, notes = list(texts), tokenizer.known_words, list[str]()
    if words := unknown_words(texts, tokenizer):
        notes.append(note_on(words, known))
    if known is not None and (bare := [text for text in texts if text.strip() and not words_of(text)]):
        notes.append(f"{bare[0][:40]!r} holds no words, so the result may show anything")
    for note in notes:
        warnings.warn(note, UnknownWords, stacklevel=4)
    return notes
