"""Interleaved documents: texts and any number of pictures in one sequence, or text alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from unidiff.data import report
from unidiff.data.members import MemberError
from unidiff.tokens.text import TextTokenizer

Part = str | Tensor
"""A text, or a picture: uint8 `[3, H, W]`."""


def document_parts(metadata: Any, images: Mapping[str, Tensor]) -> list[Part]:
    """Texts and pictures of a sample in reading order.

    Args:
        metadata: the sample's `json`: `{"texts": ["...", null, ...], "images": [null, "0.jpg", ...]}`, two lists of the same
            length with one of the two at each place (the layout of OBELICS, Laurencon et al. 2023, with names of members in
            place of addresses).
        images: the sample's pictures by name.

    Raises:
        MemberError: other metadata, a picture that is not there, or nothing at all.
    """
    texts, names = (metadata.get(k) if isinstance(metadata, Mapping) else None for k in ("texts", "images"))
    if not isinstance(texts, list) or not isinstance(names, list) or len(texts) != len(names):
        raise MemberError(report.BAD_JSON, "expected the lists `texts` and `images`, as long as each other")
    parts: list[Part] = []
    for place, (text, name) in enumerate(zip(texts, names, strict=True)):
        if isinstance(text, str) == isinstance(name, str) or not {type(text), type(name)} <= {str, type(None)}:
            raise MemberError(
                report.BAD_JSON, f"place {place} must have a text or the name of an image, and null beside it"
            )
        if text is not None:
            parts += [text.strip()] if text.strip() else []
        elif name in images:
            parts.append(images[name])
        else:
            raise MemberError(report.MISSING_MEMBER, f"image {name!r} is not in the sample")
    if not parts:
        raise MemberError(report.BAD_JSON, "a document without text and pictures")
    return parts


@dataclass(frozen=True)
class Document:
    """`tokens` int32 `[n]`, each modality from 0, `images` int32 `[k]`, where pictures begin, and whether the end was cut."""

    tokens: np.ndarray
    images: np.ndarray
    cut: bool


def lay_out(parts: Sequence[str | np.ndarray], tokenizer: TextTokenizer, length: int) -> Document:
    """Token ids of a document, with EOS at its end: at most `length`, cut before a picture or inside of a text.

    A document that was cut has no EOS. Pictures are codes `[h, w]`, none larger than `length`.
    """
    ids: list[int] = []
    starts: list[int] = []
    for part in parts:
        new = tokenizer.encode(part) if isinstance(part, str) else part.reshape(-1).tolist()
        room = length - len(ids)
        if not isinstance(part, str):
            if len(new) > room:
                break
            starts.append(len(ids))
        ids += new[:room]
        if len(new) > room:
            break
    else:
        if len(ids) < length:
            return Document(np.asarray([*ids, tokenizer.eos_id], np.int32), np.asarray(starts, np.int32), False)
    return Document(np.asarray(ids, np.int32), np.asarray(starts, np.int32), True)
