"""Words that a model was never taught: found before the decode, said in the result, as a warning and on the command line.

A model whose text tokenizer carries a list of known words (`TextTokenizer.known_words`) was trained on these and no others;
models of free text have no list, and only words that their tokenizer has no ids for are reported.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterable, Sequence

from unidiff.errors import few
from unidiff.holes import split_holes
from unidiff.tokens.text import TextTokenizer

# words, and signs that do more than part them: pictures, #, /
_WORD = re.compile(r"[^\W_]+(?:[-'\u2019][^\W_]+)*|(?:[^\w\s.,;:!?\"'()\u2010-\u2027-]|_)")
_MOST = 8  # words that a message lists


class UnknownWords(UserWarning):
    """The model draws or answers something else than these words say."""


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
    return f"the word{'s' if len(words) > 1 else ''} {few(shown, _MOST)}"


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
