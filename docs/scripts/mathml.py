"""A hook of the site: formulas become MathML, which browsers draw themselves, so that no script is loaded for them."""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

_INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
_BLOCK = re.compile(r'<div class="arithmatex">\\\[(.*?)\\\]</div>', re.DOTALL)


def on_page_content(content: str, **_: Any) -> str:
    """Called by MkDocs with the HTML of each page."""
    content = _BLOCK.sub(lambda found: convert(html.unescape(found[1]).strip(), display="block"), content)
    return _INLINE.sub(lambda found: convert(html.unescape(found[1])), content)
