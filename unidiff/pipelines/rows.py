"""The rows of unidiff's own models: a text span (task token, words, hidden tokens, end-of-text), then one image span."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

from unidiff.families.layout import DecodeRequest, Grid, RowLayout, TaskInputs, TaskNeeds, hidden_words, lay_out
from unidiff.pipelines.settings import PipelineSettings
from unidiff.tokens import Span, Vocabulary
from unidiff.tokens.text import TextTokenizer, note_on, short, unknown_words


@dataclass(frozen=True)
class TextSlot:
    """The text span of one row.

    Attributes:
        ids: text ids from the first position on, None where hidden.
        start: first position of the words that the caller gets back.
        filled: whether end-of-text, which is known, fills the span up; otherwise padding that the model never sees.
        known: nothing is decoded; hidden words stay [MASK].
    """

    ids: Sequence[int | None]
    start: int = 1
    filled: bool = True
    known: bool = False


@dataclass(frozen=True)
class NativeLayout(RowLayout):
    """Every task that a picture with its caption or a question has; one clear sentence where words do not fit.

    Args:
        texts: with the task tokens of `settings`.
        settings: spans, and settings of every task.
    """

    texts: TextTokenizer
    settings: PipelineSettings
    family: str = "a model of unidiff"
    all_words: ClassVar[bool] = True

    @property
    def vocabulary(self) -> Vocabulary:  # type: ignore[override]
        return self.settings.vocabulary

    @property
    def grid(self) -> Grid:
        return self.settings.grid

    @property
    def most(self) -> int:
        """Words (in tokens) that a caption can hold."""
        return self.settings.text_length - 1

    longest = most

    def check_parts(self, transformer: Any, images: Any, texts: Any) -> None:
        super().check_parts(transformer, images, texts)
        own, size = transformer.config.vocab_size, self.vocabulary.size
        if own != size:
            raise ValueError(
                f"the transformer has {own} ids but the vocabulary {size}; give the tokenizers it was trained with"
            )
        if texts.size > self.vocabulary.text_size:
            raise ValueError(
                f"the text tokenizer has {texts.size} ids, but the model {self.vocabulary.text_size}; give the one it was "
                "trained with"
            )
        known = texts.specials()
        if missing := [name for name in self.settings.task_tokens.values() if name not in known]:
            raise ValueError(f"the text tokenizer has no special token {missing[0]!r}; it has {sorted(known)}")

    def candidates(self, task: str) -> int:
        return self.settings.num_candidates.get(task, 1)

    def note(self, task: str) -> str:
        if self.settings.tasks is None or task in self.settings.tasks:
            return ""
        others = ", ".join(self.settings.trained) or "nothing"
        return f"the model was not trained for {task}, so the result is likely noise; it was trained for {others}"

    def text_to_image(self, inputs: TaskInputs) -> DecodeRequest:
        slots = [self.caption_slot(text) for text in inputs.texts or ()]
        away = None
        if inputs.negative is not None:
            unsaid = TextSlot([self._task["caption"], *[None] * self.most], known=True)
            away = [self.caption_slot(t, "negative_prompt") if t.strip() else unsaid for t in inputs.negative]
        return self._request("text_to_image", slots, inputs, away)

    def caption(self, inputs: TaskInputs) -> DecodeRequest:
        return self._request("caption", [self._hidden(inputs.longest)] * inputs.count, inputs)

    def answer(self, inputs: TaskInputs) -> DecodeRequest:
        slots = [self._question(text, inputs.longest) for text in inputs.texts or ()]
        return self._request("answer", slots, inputs)

    def inpaint(self, inputs: TaskInputs) -> DecodeRequest:
        return self._holes("inpaint", inputs)

    def generate(self, inputs: TaskInputs) -> DecodeRequest:
        return self._holes("generate", inputs)

    def caption_slot(self, text: str, what: str = "prompt") -> TextSlot:
        """A caption: words, hidden tokens in place of its holes, end-of-text fill."""
        ids = hidden_words(text.strip(), self.texts.encode, self.most)
        if len(ids) > self.most:
            raise ValueError(
                f"{what} {short(text)} has {len(ids)} tokens, but this model holds at most {self.most}; shorten it"
                f"{self._hint(text)}"
            )
        return TextSlot([self._task["caption"], *ids])

    @cached_property
    def _task(self) -> dict[str, int]:
        return {name: self.texts.special(token) for name, token in self.settings.task_tokens.items()}

    def _hidden(self, longest: int) -> TextSlot:
        """A caption of unknown words."""
        return TextSlot([self._task["caption"], *[None] * longest], filled=False)

    def _question(self, text: str, longest: int) -> TextSlot:
        """A known question and a hidden answer."""
        words = self.texts.encode(text.strip())
        head = [self._task["question"], *words, self._task["answer"]]
        free = self.settings.text_length - len(head)
        if free < 1:
            raise ValueError(
                f"question {short(text)} has {len(words)} tokens, but this model holds questions of at most "
                f"{self.settings.text_length - 3} tokens; shorten it{self._hint(text)}"
            )
        return TextSlot([*head, *[None] * min(longest, free)], start=len(head), filled=False)

    def _hint(self, text: str) -> str:
        """Words that were never taught are spelt letter by letter, which makes many tokens of a few."""
        words = unknown_words([text], self.texts)
        return f" ({note_on(words, self.texts.known_words)})" if words else ""

    def _holes(self, task: str, inputs: TaskInputs) -> DecodeRequest:
        if inputs.texts is None:
            return self._request(task, [self._hidden(inputs.longest)] * inputs.count, inputs)
        return self._request(task, [self.caption_slot(text, "text") for text in inputs.texts], inputs, closed=True)

    def _request(
        self,
        task: str,
        slots: Sequence[TextSlot],
        inputs: TaskInputs,
        away: Sequence[TextSlot] | None = None,
        closed: bool = False,
    ) -> DecodeRequest:
        """Rows of text slots and pictures.

        Args:
            closed: every hole has a fixed number of tokens, so that end-of-text may not fill one.
        """
        eos, start = self.texts.eos_id, self.vocabulary.text[0]
        never = [*(i for i in self._task.values() if i != eos), *([eos] if closed else [])]
        needs = TaskNeeds(tuple(i + start for i in never))
        rows = [self._row(slot, number, inputs) for number, slot in enumerate(slots)]
        others = [] if away is None else [[self._row(slot, number, inputs) for number, slot in enumerate(away)]]
        request = lay_out(rows, self.settings.samplers[task], needs, others, drawn=task == "text_to_image")
        # the task token stays visible, as in guidance training
        return replace(request, always_seen=request.batch.positions[..., 0] == 0)

    def _row(self, slot: TextSlot, number: int, inputs: TaskInputs) -> list[Span]:
        vocabulary, total = self.vocabulary, self.settings.text_length
        start, fill = vocabulary.text[0], total - len(slot.ids)
        ids = [None if i is None else i + start for i in slot.ids]
        spans = [Span.words(ids[: slot.start], vocabulary), Span.words(ids[slot.start :], vocabulary, read=True)]
        if slot.known:
            spans = [replace(span, given=True) for span in spans]
        if slot.filled:
            spans.append(Span.text([self.texts.eos_id + start] * fill, True))
        else:
            spans.append(replace(Span.text([0] * fill), exists=False))
        return [*spans, inputs.picture(number, vocabulary, self.grid)]
