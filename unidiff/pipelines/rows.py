"""From words and image codes to rows: the text slot (task token, words, hidden tokens, end-of-text) and the batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unidiff.pipelines.arguments import texts_of, whole
from unidiff.pipelines.holes import refuse_holes, short, split_holes
from unidiff.pipelines.settings import PipelineSettings
from unidiff.tokens import Span, TokenBatch
from unidiff.tokens.known_words import note_on, unknown_words
from unidiff.tokens.text import TextTokenizer


@dataclass(frozen=True)
class TextSlot:
    """The text span of one row.

    Attributes:
        ids: vocabulary ids `[T]`; [MASK] where hidden.
        given: bool `[T]`.
        length: positions that exist; the rest is padding that the model never sees.
        start: first position of the words that the caller gets back.
        closed: every hole has a fixed number of tokens, so end-of-text may not fill one.
    """

    ids: tuple[int, ...]
    given: tuple[bool, ...]
    length: int
    start: int = 1
    closed: bool = False


class TextSlots:
    """Builds text slots; raises one clear sentence where the words do not fit.

    Args:
        tokenizer: with the task tokens of `settings`.
        settings: row layout.
    """

    def __init__(self, tokenizer: TextTokenizer, settings: PipelineSettings) -> None:
        self.tokenizer, self.settings = tokenizer, settings
        self._offset = settings.vocabulary.text[0]
        self._eos = tokenizer.eos_id
        self._task = {name: tokenizer.special(token) for name, token in settings.task_tokens.items()}

    @property
    def room(self) -> int:
        """Words (in tokens) that a caption can hold."""
        return self.settings.text_length - 1

    def never(self, closed: bool) -> tuple[int, ...]:
        """Vocabulary ids that no hidden text token may become: task tokens, and end-of-text in closed slots."""
        ids = [i for i in self._task.values() if i != self._eos]
        return tuple(i + self._offset for i in (*ids, *([self._eos] if closed else [])))

    def prompt(self, text: str, what: str = "prompt") -> TextSlot:
        """A caption that is known in full: task token, words, end-of-text fill."""
        words = self._words(text, what)
        self._fits(len(words), text, what)
        return self._slot([self._task["caption"], *words], [True] * (1 + len(words)))

    def hidden(self, max_text_tokens: int | None = None) -> TextSlot:
        """A caption of unknown words and length, at most `max_text_tokens` of them."""
        length = 1 + self._limit(max_text_tokens)
        return self._slot([self._task["caption"]] + [None] * (length - 1), [True] + [False] * (length - 1), length)

    def unsaid(self) -> TextSlot:
        """A caption of hidden words that nobody asks for, as guidance leads away from."""
        return self._slot([self._task["caption"]] + [None] * self.room, [True] * self.settings.text_length)

    def question(self, text: str, max_text_tokens: int | None = None) -> TextSlot:
        """A known question and a hidden answer of at most `max_text_tokens`."""
        words = self._words(text, "question")
        head = [self._task["question"], *words, self._task["answer"]]
        free = self.settings.text_length - len(head)
        if free < 1:
            raise ValueError(
                f"question {short(text)} has {len(words)} tokens, but this model holds questions of at most "
                f"{self.settings.text_length - 3} tokens; shorten it{self._hint(text)}"
            )
        length = len(head) + min(self._limit(max_text_tokens), free)
        hidden = length - len(head)
        return self._slot(head + [None] * hidden, [True] * len(head) + [False] * hidden, length, start=len(head))

    def template(self, text: str) -> TextSlot:
        """Words with holes: `<mask>` hides one token (with the space in front of it), `<mask:3>` three."""
        texts_of(text, "text")
        ids: list[int | None] = [self._task["caption"]]
        for part in split_holes(text.strip(), self.room):
            ids += [None] * part if isinstance(part, int) else self.tokenizer.encode(part)
        self._fits(len(ids) - 1, text, "text")
        return self._slot(ids, [i is not None for i in ids], closed=True)

    def words(self, ids: Sequence[int], slot: TextSlot) -> list[int]:
        """Text ids that a decoded slot (vocabulary ids `[T]`) says: from its start to before the first end-of-text."""
        body = [int(i) - self._offset for i in ids[slot.start : slot.length]]
        return body[: body.index(self._eos)] if self._eos in body else body

    def _slot(
        self,
        ids: Sequence[int | None],
        given: Sequence[bool],
        length: int | None = None,
        start: int = 1,
        closed: bool = False,
    ) -> TextSlot:
        total = self.settings.text_length
        mask = self.settings.vocabulary.mask_id
        fill = total - len(ids)
        laid = [mask if i is None else i + self._offset for i in ids] + [self._eos + self._offset] * fill
        return TextSlot(tuple(laid), (*given, *[True] * fill), total if length is None else length, start, closed)

    def _words(self, text: str, what: str) -> list[int]:
        texts_of(text, what)
        refuse_holes([text], what, "pipe.generate(text=...) and pipe.inpaint(...) fill <mask> holes")
        return self.tokenizer.encode(text.strip())

    def _fits(self, count: int, text: str, what: str) -> None:
        if count > self.room:
            raise ValueError(
                f"{what} {short(text)} has {count} tokens, but this model holds at most {self.room}; shorten it"
                f"{self._hint(text)}"
            )

    def _hint(self, text: str) -> str:
        """Words that were never taught are spelt letter by letter, which makes many tokens of a few."""
        words = unknown_words([text], self.tokenizer)
        return f" ({note_on(words, self.tokenizer.known_words)})" if words else ""

    def _limit(self, max_text_tokens: int | None) -> int:
        if max_text_tokens is None:
            return self.room
        return whole(max_text_tokens, "max_text_tokens", 1, self.room)


def build_batch(
    slots: Sequence[TextSlot], codes: Tensor | None, hidden: Tensor | None, settings: PipelineSettings
) -> TokenBatch:
    """Rows `text span, image span`.

    Args:
        slots: B text slots.
        codes: int64 `[B, h, w]` from the image tokenizer, or None for pictures that are hidden entirely.
        hidden: bool `[B, h, w]`, codes to decode again; None for no code (with `codes`).

    Raises:
        ValueError: a row without anything to decode.
    """
    vocabulary, (height, width) = settings.vocabulary, settings.grid
    rows = []
    for number, slot in enumerate(slots):
        text = Span.text(slot.ids, torch.tensor(slot.given))
        if codes is None:
            image = Span.masked_image((height, width), vocabulary)
        else:
            ids = codes[number].cpu() + vocabulary.image[0]
            known = torch.ones_like(ids, dtype=torch.bool) if hidden is None else ~hidden[number].cpu()
            image = Span.image(torch.where(known, ids, vocabulary.image_mask), known)
        rows.append((text, image))
    batch = TokenBatch.from_spans(rows)
    lengths = torch.tensor([slot.length for slot in slots])
    place = torch.arange(batch.shape[1])
    valid = (place < lengths[:, None]) | (place >= settings.text_length)  # [B, L]
    batch = batch.replace(
        valid=valid, given=batch.given | ~valid, sample_ids=torch.where(valid, 0, -1), ids=batch.ids * valid
    )
    if bool((~batch.targets.any(1)).any()):
        raise ValueError(
            "nothing is left to decode: text and picture are known in full; hide words with <mask> or paint a mask"
        )
    return batch
