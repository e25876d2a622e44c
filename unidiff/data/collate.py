"""From words to the text span of a training row: task token, words, EOS fill; and question / answer rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from unidiff.tokens.text import TextTokenizer

TEXT_PREFIX = 1  # leading positions of a caption row that are always given: the task token
TASK_TOKENS = ("eos", "caption", "question", "answer")


@dataclass(frozen=True)
class CaptionRow:
    """`ids` (text ids, exactly the row's length) and whether words were cut to make them fit."""

    ids: list[int]
    cut: bool


@dataclass(frozen=True)
class QuestionRow:
    """`ids` (exactly the row's length); everything before `answer_start` is given."""

    ids: list[int]
    answer_start: int


def check_task_tokens(tokenizer: TextTokenizer) -> None:
    """Raise ValueError unless the tokenizer has the four task tokens."""
    known = tokenizer.specials()
    if missing := [name for name in TASK_TOKENS if name not in known]:
        raise ValueError(
            f"the text tokenizer has no special token {missing[0]!r}; "
            "train one with tokenizers/train_text_tokenizer.py, whose defaults include it"
        )


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
