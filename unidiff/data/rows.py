"""From texts and pictures to token rows: captions, questions with answers, and interleaved documents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from unidiff.data import report
from unidiff.data.report import Unusable
from unidiff.tokens.text import TextTokenizer

TEXT_PREFIX = 1  # leading positions of a caption row that are always given: the task token
Part = str | Tensor
"""A text, or a picture: uint8 `[3, H, W]`."""


class CaptionRow(NamedTuple):
    """`ids` (text ids, exactly the row's length) and whether words were cut to make them fit."""

    ids: list[int]
    cut: bool


class QuestionRow(NamedTuple):
    """`ids` (exactly the row's length); everything before `answer_start` is given."""

    ids: list[int]
    answer_start: int


def task_tokens(tokenizer: TextTokenizer) -> dict[str, int]:
    """Ids of the four task tokens. Raises ValueError where the tokenizer lacks one."""
    known = tokenizer.specials()
    for name in (wanted := ("eos", "caption", "question", "answer")):
        if name not in known:
            raise ValueError(
                f"the text tokenizer has no special token {name!r}; "
                "train one with `unidiff tokenizer text`, whose defaults include it"
            )
    return {name: known[name] for name in wanted}


def caption_row(tokenizer: TextTokenizer, caption: str, length: int) -> CaptionRow:
    """`<|caption|> words <|eos|> ... <|eos|>`. A caption too long is cut and then ends without EOS."""
    words = tokenizer.encode(caption.strip())
    room = length - TEXT_PREFIX
    ids = [tokenizer.special("caption"), *words[:room]]
    return CaptionRow(ids + [tokenizer.eos_id] * (length - len(ids)), len(words) > room)


def question_row(tokenizer: TextTokenizer, question: str, answer: str, length: int) -> QuestionRow | None:
    """`<|question|> question <|answer|> answer <|eos|> ...`; None when it does not fit with at least one EOS."""
    given = [tokenizer.special("question"), *tokenizer.encode(question.strip()), tokenizer.special("answer")]
    ids = given + tokenizer.encode(answer.strip()) + [tokenizer.eos_id]
    if len(ids) > length:
        return None
    return QuestionRow(ids + [tokenizer.eos_id] * (length - len(ids)), len(given))


def qa_pairs(metadata: Any) -> tuple[list[tuple[str, str]], int]:
    """Question / answer pairs of a sample's json, `{"qa": [[question, answer], ...]}`, and how many entries are none."""
    entries = metadata.get("qa") if isinstance(metadata, dict) else None
    if not isinstance(entries, list):
        return [], int(entries is not None)
    pairs = [
        (pair[0], pair[1])
        for pair in entries
        if isinstance(pair, list) and len(pair) == 2 and all(isinstance(p, str) and p.strip() for p in pair)
    ]
    return pairs, len(entries) - len(pairs)


def document_parts(metadata: Any, images: Mapping[str, Tensor]) -> list[Part]:
    """Texts and pictures of a sample in reading order.

    Args:
        metadata: the sample's `json`: `{"texts": ["...", null, ...], "images": [null, "0.jpg", ...]}`, two lists of the same
            length with one of the two at each place (as in OBELICS, Laurencon et al. 2023, with names of members in place
            of addresses).
        images: the sample's pictures by name.

    Raises:
        Unusable: other metadata, a picture that is not there, or nothing at all.
    """
    texts, names = (metadata.get(k) if isinstance(metadata, Mapping) else None for k in ("texts", "images"))
    if not isinstance(texts, list) or not isinstance(names, list) or len(texts) != len(names):
        raise Unusable(report.BAD_JSON, "expected the lists `texts` and `images`, as long as each other")
    parts: list[Part] = []
    for place, (text, name) in enumerate(zip(texts, names, strict=True)):
        if isinstance(text, str) == isinstance(name, str) or not {type(text), type(name)} <= {str, type(None)}:
            raise Unusable(
                report.BAD_JSON, f"place {place} must have a text or the name of an image, and null beside it"
            )
        if text is not None:
            parts += [text.strip()] if text.strip() else []
        elif name in images:
            parts.append(images[name])
        else:
            raise Unusable(report.MISSING_MEMBER, f"image {name!r} is not in the sample")
    if not parts:
        raise Unusable(report.BAD_JSON, "a document without text and pictures")
    return parts


class Document(NamedTuple):
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
    cut = False
    for part in parts:
        new = tokenizer.encode(part) if isinstance(part, str) else part.reshape(-1).tolist()
        room = length - len(ids)
        cut = len(new) > room
        if not isinstance(part, str):
            if cut:
                break
            starts.append(len(ids))
        ids += new[:room]
        if cut:
            break
    cut = cut or len(ids) == length
    return Document(np.asarray(ids if cut else [*ids, tokenizer.eos_id], np.int32), np.asarray(starts, np.int32), cut)
