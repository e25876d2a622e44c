"""Scenes of any world as training data: raw samples for webdataset shards, and pre-tokenised tables for the trainer."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor

from unidiff.data.rows import caption_row, question_row
from unidiff.tokens import Vocabulary
from unidiff.tokens.image.protocols import ImageEncoder
from unidiff.tokens.text import TextTokenizer

TASK_SPECIALS = ("eos", "caption", "question", "answer")


class SceneSource(Protocol):
    """Scenes by number, each a function of its number alone, and what is said about them."""

    def pictures(self, start: int, stop: int) -> Tensor:
        """Those of scenes `start .. stop`: float32 `[n, 3, H, W]` in [0, 1]."""

    def texts(self, number: int, captions: int) -> tuple[list[str], list[tuple[str, str]]]:
        """So many captions of a scene, and (question, answer) pairs, as many for every scene."""

    def level(self, number: int) -> int:
        """How hard a scene is, for a curriculum."""


def corpus(scenes: SceneSource, count: int) -> Iterator[str]:
    """Captions, questions and answers of `count` scenes, for training a text tokenizer."""
    for number in range(count):
        captions, questions = scenes.texts(number, 1)
        yield from (*captions, *(questions[0] if questions else ()))


def raw_samples(scenes: SceneSource, count: int) -> Iterator[tuple[str, dict]]:
    """`(key, members)` for a shard writer: a PNG, one caption, and questions with answers in the json."""
    for number in range(count):
        key, buffer = f"{number:09d}", io.BytesIO()
        (caption,), questions = scenes.texts(number, 1)
        pixels = (scenes.pictures(number, number + 1)[0] * 255).round().to(torch.uint8)
        Image.fromarray(pixels.movedim(0, -1).contiguous().numpy()).save(buffer, format="PNG")
        metadata = {"key": key, "caption": caption, "qa": [list(q) for q in questions]}
        yield key, {"png": buffer.getvalue(), "txt": caption, "json": metadata}


def scene_vocabulary(text: TextTokenizer, codebook_size: int) -> Vocabulary:
    """Text ids, [MASK], image codes; the task tokens are text ids."""
    specials = {name: text.special(name) for name in TASK_SPECIALS}
    return Vocabulary.unified(text.size, codebook_size, specials)


def token_rows(
    scenes: SceneSource,
    start: int,
    count: int,
    image: ImageEncoder,
    text: TextTokenizer,
    text_length: int,
    captions: int = 4,
) -> dict[str, Tensor]:
    """Tensors of a token table for scenes `start .. start + count`: codes, captions, questions, answer_start, levels.

    Raises:
        ValueError: a caption or question that does not fit `text_length`.
    """
    stop = start + count
    codes = torch.cat([image.encode(scenes.pictures(i, min(i + 256, stop))) for i in range(start, stop, 256)])
    found: dict[str, list] = {"captions": [], "questions": [], "answer_start": []}
    for number in range(start, stop):
        said, asked = scenes.texts(number, captions)
        rows = [caption_row(text, caption, text_length) for caption in said]
        answers = [row for q, a in asked if (row := question_row(text, q, a, text_length)) is not None]
        if any(row.cut for row in rows) or len(answers) < len(asked):
            raise ValueError(f"scene {number} needs more than {text_length} text tokens; raise text_length")
        found["captions"].append([row.ids for row in rows])
        found["questions"].append([row.ids for row in answers])
        found["answer_start"].append([row.answer_start for row in answers])
    levels = torch.tensor([scenes.level(number) for number in range(start, stop)])
    return {"codes": codes, "levels": levels, **{name: torch.tensor(rows) for name, rows in found.items()}}
