"""Rows of the text families: texts that go on, holes, and conversations in their families' templates.

An answer ends before its first end-of-text or end of turn. Words never become marks: they are encoded on their own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

from unidiff.decoding.config import SamplerConfig
from unidiff.families.layout import DecodeRequest, Encode, RowLayout, TaskInputs, TaskNeeds, hidden_words, lay_out
from unidiff.tokens import Span, Vocabulary
from unidiff.tokens.text import MOST_TOKENS, has_holes, short

ROLES = ("system", "user", "assistant")
Message = Mapping[str, str]
Turn = str | Sequence[int] | Sequence[Message]


@dataclass(frozen=True)
class ChatTemplate:
    """How turns are written; a part is the name of a mark in angle brackets, or words with `{role}` and `{content}`.

    Args:
        marks: ids by name; without any the tokenizer has none, and nothing is asked.
        opening: parts before the first turn. turn: parts of a turn. answer: parts that open the answer.
        system: what the system says where a conversation does not begin with it; None for nothing.
        end: the mark that ends a turn. roles: how roles are written, where it is not as ours.
        sampler: vocabulary to the family's sampler settings.
        spelled: how the released tokenizers spell the marks.
    """

    marks: Mapping[str, int] = field(default_factory=dict)
    opening: tuple[str, ...] = ()
    turn: tuple[str, ...] = ()
    answer: tuple[str, ...] = ()
    system: str | None = None
    end: str = "eot"
    sampler: Callable[[Vocabulary], SamplerConfig] = lambda vocabulary: SamplerConfig()
    spelled: Mapping[str, str] = field(default_factory=dict)
    roles: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class TextLayout(RowLayout):
    """Texts that go on, and texts with holes.

    Args:
        vocabulary: of the model. encode: text to ids without special ones.
        config: sampler settings; steps are one for each token, as upstream recommends, unless `paced`.
        paced: the settings bring their number of passes.
        left: pad on the left, as the reference programs do, or on the right; the answers are the same.
    """

    vocabulary: Vocabulary
    encode: Encode
    config: SamplerConfig
    paced: bool = False
    left: bool = True
    family: str = ""

    @property
    def longest(self) -> int:
        return 128

    def complete(self, inputs: TaskInputs) -> DecodeRequest:
        return self._go_on([self._as_ids(text) for text in inputs.texts or ()], inputs.longest)

    def infill(self, inputs: TaskInputs) -> DecodeRequest:
        """End-of-text fills no hole, and holes are no blocks."""
        for line in inputs.texts or ():
            if not has_holes(line):
                raise ValueError(f"text {short(line)} is known in full; hide words with <mask> or <mask:n>")
        rows = [[Span.words(hidden_words(t, self.encode), self.vocabulary, read=True)] for t in inputs.texts or ()]
        config = self._paced(MOST_TOKENS)  # whatever the row: a quota makes no more than its holes
        config = replace(config, text=replace(config.text, block_length=None))
        eos = self.vocabulary.specials.get("eos")
        never = (*self.never, *self.ends, *(() if eos is None else (eos,)))
        return lay_out(rows, config, TaskNeeds(never, stop_at_eos=False), left=self.left)

    def known(self, inputs: TaskInputs) -> DecodeRequest:
        """Texts as they are, each behind its prompt (`turns`) if there is one."""
        prompts = inputs.turns or [""] * inputs.count
        rows = [
            [Span.text(self._as_ids(prompt), True), Span.words(self._as_ids(text), self.vocabulary, read=True)]
            for prompt, text in zip(prompts, inputs.texts or (), strict=True)
        ]
        return lay_out(rows, self.config, left=self.left)

    @property
    def ends(self) -> tuple[int, ...]:
        """Ids that end a text, besides end-of-text."""
        return ()

    @property
    def never(self) -> tuple[int, ...]:
        """Ids that are never written: what the family's settings forbid, and marks that only prompts have."""
        return self.config.text.forbid

    def _as_ids(self, text: str | Sequence[int]) -> Sequence[int]:
        """Ids of a text; ids are taken as they are."""
        return self.encode(text) if isinstance(text, str) else text

    def _go_on(self, prompts: Sequence[Sequence[int]], longest: int) -> DecodeRequest:
        hidden = Span.words([None] * longest, self.vocabulary, read=True)
        rows = [[Span.text(prompt, True), hidden] for prompt in prompts]
        return lay_out(rows, self._paced(longest), TaskNeeds(self.never, self.ends), left=self.left)

    def _paced(self, steps: int) -> SamplerConfig:
        return self.config if self.paced else replace(self.config, text=replace(self.config.text, steps=steps))


@dataclass(frozen=True)
class ChatLayout(TextLayout):
    """LLaDA and Dream: conversations besides, in their template."""

    template: ChatTemplate = field(default_factory=ChatTemplate)

    def check_marks(self) -> None:
        """Raise `ValueError` for a tokenizer without marks of turns."""
        if not self.template.marks:
            raise ValueError(
                f"the text tokenizer of this {self.family} has no marks for turns; give the one it was trained with "
                "(text_tokenizer=), or use complete, which needs none"
            )

    def chat(self, inputs: TaskInputs) -> DecodeRequest:
        self.check_marks()
        return self._go_on([self.ids(turn) for turn in inputs.turns or ()], inputs.longest)

    @property
    def ends(self) -> tuple[int, ...]:
        return tuple(i for name, i in self.template.marks.items() if name == self.template.end)

    @property
    def never(self) -> tuple[int, ...]:
        kept = (self.vocabulary.specials.get("eos"), *self.ends)
        return (*self.config.text.forbid, *(i for i in self.template.marks.values() if i not in kept))

    def ids(self, turn: Turn) -> list[int]:
        """A conversation in the template, up to where the answer begins; ids are taken as they are."""
        if not isinstance(turn, str) and all(isinstance(part, int) for part in turn):
            return list(cast("list[int]", turn))
        said: list[object] = [{"role": "user", "content": turn}] if isinstance(turn, str) else list(turn)
        ids: list[int] = []
        for mark, words in self._pieces(cast("list[Message]", said)):
            ids += [self.template.marks[mark]] if mark else self.encode(words)
        return ids

    def written(self, messages: Sequence[Message], answer: bool = True) -> str:
        """A conversation in the template as the released tokenizers spell it: `ids`, where they read the marks as such.

        Args:
            answer: it ends where the answer begins; else inside the last message, which is gone on with.
        """
        return "".join(self.template.spelled[mark] if mark else words for mark, words in self._pieces(messages, answer))

    def spelled_ids(self, text: str) -> list[int]:
        """Ids of a text as `written` makes it: what is spelled as a mark of the template is that mark."""
        names = {word: name for name, word in self.template.spelled.items()}
        parts = re.split(f"({'|'.join(map(re.escape, names))})", text)
        return [i for p in parts for i in ([self.template.marks[names[p]]] if p in names else self.encode(p))]

    def _pieces(self, messages: Sequence[Message], answer: bool = True) -> list[tuple[str, str]]:
        """Names of marks, "" for words, and words."""
        template = self.template
        if template.system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": template.system}, *messages]
        parts = [(part, messages[0]) for part in template.opening]
        for message in messages:
            parts += [(part, message) for part in template.turn]
        if answer:
            parts += [(part, messages[0]) for part in template.answer]
        else:  # without the end of the last message
            parts = parts[: len(parts) - len(template.turn) + template.turn.index(f"<{template.end}>")]
        return [self._filled(part, message) for part, message in parts]

    def _filled(self, part: str, message: Message) -> tuple[str, str]:
        """A part of the template with the words of a message: the name of a mark, or words behind ""."""
        if part.startswith("<"):
            return part[1:-1], ""
        role = self.template.roles.get(message["role"], message["role"])
        return "", part.replace("{role}", role).replace("{content}", message["content"].strip())


def chat_layout(template: ChatTemplate, family: str) -> Callable[[Any, Any], ChatLayout]:
    """What makes the layout of a loaded model and its tokenizer: with the tokenizer's ids of the marks, where it has them."""

    def make(released: Any, texts: Any) -> ChatLayout:
        known, vocabulary = texts.tokenizer.get_vocab(), released.vocabulary
        ids = template.marks  # the released models'
        if set(template.spelled.values()) <= set(known):
            ids = {mark: known[word] for mark, word in template.spelled.items()}
        elif max(ids.values(), default=0) >= vocabulary.text_size:
            ids = {}
        config, own = template.sampler(vocabulary), replace(template, marks=ids)
        return ChatLayout(vocabulary, texts.encode, config, family=family, template=own)

    return make


def check_turns(turns: Sequence[object]) -> list[Turn]:
    """Questions, conversations or ids as they are; `ValueError` for anything else, or nothing said."""
    for number, turn in enumerate(turns):
        name = "the question" if len(turns) == 1 else f"question {number + 1} of {len(turns)}"
        if isinstance(turn, str):
            _check_said(turn, name)
            continue
        if not isinstance(turn, list | tuple) or not turn:
            raise ValueError(f"{name} is {turn!r:.60}; expected a string, or a list of messages with role and content")
        if all(isinstance(part, int) and not isinstance(part, bool) for part in turn):
            if bad := [part for part in turn if not 0 <= part < 2**31]:
                raise ValueError(f"{name} holds the id {bad[0]}, which no vocabulary has")
            continue
        for message in turn:
            if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
                raise ValueError(f"message {message!r:.60} must have exactly a role and a content; write both")
            if message["role"] not in ROLES:
                raise ValueError(f"message role is {message['role']!r:.60}; expected one of {', '.join(ROLES)}")
            _check_said(message["content"], f"the {message['role']} message")
    return list(turns)  # type: ignore[arg-type]


def words_of_turns(turns: Sequence[Turn]) -> list[str]:
    """What is said in checked turns: questions, and the words of every message."""
    said: list[str] = []
    for turn in turns:
        said += [turn] if isinstance(turn, str) else [part["content"] for part in turn if isinstance(part, Mapping)]
    return said


def _check_said(words: object, name: str) -> None:
    if not isinstance(words, str):
        raise ValueError(f"{name} is {words!r:.60}; expected a string")
    if not words.strip():
        raise ValueError(f"{name} is empty; write at least one word")
    if any("\ud800" <= c <= "\udfff" for c in words):
        raise ValueError(f"{name} holds a lone surrogate, which is no character; leave it out")
