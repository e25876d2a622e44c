"""Code blocks of the documentation, for tests that run them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

DOCS = Path(__file__).resolve().parents[1] / "docs"


class Block(NamedTuple):
    """A fenced block: the heading above it, its language, its text and the line it starts at."""

    heading: str
    language: str
    text: str
    line: int


def blocks(name: str, language: str = "python") -> list[Block]:
    """The blocks of a language in `docs/<name>`, in order."""
    found, heading, fence, lines = [], "", None, []
    for number, line in enumerate((DOCS / name).read_text(encoding="utf-8").splitlines(), 1):
        if fence is None and (mark := re.fullmatch(r"```(\w+)", line)):
            fence, start, lines = mark[1], number, []
        elif fence is not None and line == "```":
            found.append(Block(heading, fence, "\n".join(lines) + "\n", start))
            fence = None
        elif fence is not None:
            lines.append(line)
        elif line.startswith("#"):
            heading = line.lstrip("# ")
    assert fence is None, f"{name} ends inside a code block"
    return [block for block in found if block.language == language]


def run(block: Block, name: str, namespace: dict) -> None:
    """Execute a block; errors name the line of the document."""
    source = "\n" * block.line + block.text
    exec(compile(source, str(DOCS / name), "exec", dont_inherit=True), namespace)
