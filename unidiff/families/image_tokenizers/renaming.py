"""Names of released convolutional autoencoders."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

# our names inside a level, and the names that all of them use
_PARTS = ((r"\.shortcut\.", ".nin_shortcut."), (r"\.out\.", ".proj_out."))

Rename = Callable[[str], str]


def rename_with(rules: Iterable[tuple[str, str | Callable[[re.Match[str]], str]]]) -> Rename:
    """A renaming by regular expressions, applied in order after those that all families share."""
    compiled = [(re.compile(pattern), value) for pattern, value in (*_PARTS, *rules)]

    def rename(name: str) -> str:
        for pattern, value in compiled:
            name = pattern.sub(value, name)
        return name

    return rename
