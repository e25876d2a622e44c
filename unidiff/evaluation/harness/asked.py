"""What a harness asks, as plain values: contexts with pictures, stop strings, lengths, temperatures."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, NamedTuple

from unidiff.evaluation.harness.settings import OPTIONS, HarnessSettings
from unidiff.pipelines.options import short, whole

USUAL = 256  # tokens to write where neither the task nor the command line says it, as in the harness
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_MOST = 1_000_000
_log = logging.getLogger(__name__)
_named: set[str] = set()
_MARK = re.compile(r"\s*<image(?:[ _]?\d+)?>\s*")


class Context(NamedTuple):
    """What comes before: words, and pictures that they are about (PIL)."""

    words: str
    pictures: tuple[Any, ...] = ()

    def seed(self, base: int, number: int = 0) -> int:
        """A seed from words and pictures alone, so that neither order nor batch changes it; `number` tells repeats apart."""
        digest = blake2b(f"{base} {number} {self.words}".encode("utf-8", "surrogatepass"), digest_size=8)
        for picture in self.pictures:
            digest.update(f"{picture.mode} {picture.size}".encode() + picture.tobytes())
        return int.from_bytes(digest.digest(), "big") >> 2


class Wish(NamedTuple):
    """A text to write: where it stops, its longest length in tokens, and options of the decode."""

    until: tuple[str, ...] = ()
    longest: int = USUAL
    options: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def of(cls, kwargs: Mapping[str, Any], settings: HarnessSettings) -> Wish:
        """From `gen_kwargs` of a task; what the command line says goes before.

        Without `do_sample` or a temperature the likeliest tokens are taken. Sampling settings that unidiff does not have
        (top_p, num_beams) are named in the log once.

        Raises:
            ValueError: `until` is no string and no list of them, or a length is no number of tokens.
        """
        asked = dict(kwargs)
        until = asked.pop("until", None) or ()
        stops = (until,) if isinstance(until, str) else until
        if not isinstance(stops, list | tuple) or not all(isinstance(stop, str) for stop in stops):
            raise ValueError(f"until is {short(until)}; expected a string, or a list of them")
        lengths = [asked.pop(name) for name in LENGTHS if name in asked]
        longest = settings.max_text_tokens or whole(next(iter(lengths), USUAL), LENGTHS[0], 1, _MOST)
        warmth, drawn = asked.pop("temperature", None), asked.pop("do_sample", None)
        own: dict[str, Any] = {}
        if not (bool(warmth) if drawn is None else drawn):
            own["temperature"] = 0.0
        elif warmth is not None:
            own["temperature"] = float(warmth)
        own |= {name: asked.pop(name) for name in OPTIONS if name in asked}
        if new := sorted(asked.keys() - _named):
            _named.update(new)
            _log.warning("unidiff has no %s; what the task says about it is not used", ", ".join(new))
        options = tuple(sorted({**own, **settings.options}.items()))
        return cls(tuple(stop for stop in stops if stop), longest, options)

    def cut(self, text: str) -> str:
        """A text up to its first stop string."""
        return text[: min((text.find(stop) for stop in self.until if stop in text), default=len(text))]


@dataclass(frozen=True)
class Item:
    """A row to be.

    Args:
        number: its place among what was asked. task: whose row it is, see `HarnessModel`.
        known: the context; ids of it where texts go on.
        words: the tokenizer's ids of what is scored. said: the same as a text. seed: of masks and draws.
    """

    number: int
    task: str
    context: Context
    known: Sequence[int] | str
    seed: int
    words: Sequence[int] = ()
    said: str = ""
    wish: Wish = field(default_factory=Wish)


def without_marks(text: str) -> str:
    """A text without the places of its pictures (`<image>`, `<image 1>`), which have one of their own in a row."""
    return _MARK.sub(" ", text).strip()
