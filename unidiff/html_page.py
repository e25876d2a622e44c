"""The frame of all pages that commands write: one file, for any width, light and dark, without scripts or other files."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence

_STYLE = """
:root { color-scheme: light dark; --ink: #1c1e24; --soft: #5c616b; --line: #d6d9e0; --paper: #fff; --raised: #f5f5f7 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8ee; --soft: #a2a7b3; --line: #3a3e48; --paper: #15171c; --raised: #20232a }
}
body { font: 16px/1.5 system-ui, sans-serif; margin: 1.5rem auto; max-width: 76rem; padding: 0 1rem;
  color: var(--ink); background: var(--paper); overflow-wrap: anywhere }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin: 2.2rem 0 .2rem } p { margin: .3rem 0 } .soft { color: var(--soft) }
table { border-collapse: collapse; margin: .5rem 0; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: .2rem .8rem .2rem 0; vertical-align: top }
figure { margin: 0 } img { max-width: 100% } pre { background: var(--raised); padding: .8rem; overflow: auto }
"""


def html_page(title: str, parts: Sequence[str], style: str = "") -> str:
    """A whole document.

    Args:
        title: plain text, of the window and the first heading.
        parts: HTML, one after the other. style: CSS besides that of all pages, which names the colours `--ink`, `--soft`,
            `--line`, `--paper` and `--raised`.
    """
    said, body = html.escape(title), "\n".join(parts)
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f"<title>{said}</title><style>{_STYLE}{style}</style>"
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>\n<h1>{said}</h1>\n{body}\n</body></html>\n'


def image_address(data: bytes, kind: str) -> str:
    """The bytes of a picture (`kind` "png", "gif", ...) as an address that a page can hold."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"
