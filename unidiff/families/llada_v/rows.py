"""Rows of LLaDA-V: conversations in LLaDA's template about any number of pictures, which are continuous features there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from PIL import Image

from unidiff.decoding.config import SamplerConfig
from unidiff.families.chat import ChatLayout, Turn, chat_layout
from unidiff.families.layout import DESCRIBE, DecodeRequest, TaskInputs, TaskNeeds, lay_out
from unidiff.families.llada.rows import LLADA_CHAT, llada_sampler
from unidiff.families.llada_v.network import VisionLanguageTransformer
from unidiff.tokens import Span, Vocabulary

PICTURE = -200
"""Upstream's id of the place of a picture in a prompt."""
MARK = "<image>"
"""The same in the words of a conversation."""
SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
)


def llada_v_sampler(vocabulary: Vocabulary, steps: int = 128, block_length: int = 128, **more: Any) -> SamplerConfig:
    """LLaDA's decoding with the settings of upstream's demonstration: all tokens of an answer are one block, and once its end is
    written, the passes are for what stands before it."""
    return replace(llada_sampler(vocabulary, steps, block_length, **more), first_end=True)


LLADA_V_CHAT = replace(LLADA_CHAT, system=SYSTEM, sampler=llada_v_sampler)


@dataclass(frozen=True)
class LladaVLayout(ChatLayout):
    """Answers about pictures, chat with pictures and without, and what LLaDA does.

    Args:
        network: what sees the pictures.
        squares: pictures of a row are one tile each, in a grey square, in place of tiles of any resolution; None: where a row
            has several, as in training.
        compat: None, or "upstream": end-of-text is never written, so that only the end of a turn ends an answer.
    """

    network: VisionLanguageTransformer | None = field(default=None, repr=False)
    squares: bool | None = None
    compat: str | None = None
    reads_pixels: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.compat not in (None, "upstream"):
            raise ValueError(f"compat = {self.compat!r:.80}; expected None or 'upstream'")

    @classmethod
    def of(cls, released: Any, texts: Any) -> LladaVLayout:
        """Of a loaded model and its tokenizer."""
        made = chat_layout(LLADA_V_CHAT, "llada-v")(released, texts)
        parts = {name: getattr(made, name) for name in ("vocabulary", "encode", "config", "family", "template")}
        return cls(**parts, network=released.model)

    @property
    def any_size(self) -> bool:
        return True

    @property
    def never(self) -> tuple[int, ...]:
        eos = self.vocabulary.specials.get("eos")
        return super().never if self.compat is None or eos is None else (*super().never, eos)

    def caption(self, inputs: TaskInputs) -> DecodeRequest:
        return self.answer(replace(inputs, texts=[DESCRIBE] * inputs.count))

    def answer(self, inputs: TaskInputs) -> DecodeRequest:
        return self.chat(replace(inputs, turns=inputs.texts))

    def chat(self, inputs: TaskInputs) -> DecodeRequest:
        self.check_marks()
        assert inputs.turns is not None  # the pipeline gives them
        shown = inputs.pictures or [()] * inputs.count
        rows, seen = [], dict[tuple[int, bool], list[Span]]()
        for turn, pictures in zip(inputs.turns, shown, strict=True):
            answer = Span.words([None] * inputs.longest, self.vocabulary, read=True)
            rows.append([*self.prompt(turn, pictures, seen), answer])
        return lay_out(rows, self._paced(inputs.longest), TaskNeeds(self.never, self.ends), left=self.left)

    def prompt(
        self,
        turn: Turn,
        pictures: Sequence[Image.Image] = (),
        seen: dict[tuple[int, bool], list[Span]] | None = None,
    ) -> list[Span]:
        """A conversation up to where the answer begins, with its pictures.

        Args:
            turn: see `ids`; of ids `PICTURE` stands for a picture. Words of a conversation may say where pictures go, by
                `<image>`; without they stand before the first thing the user says.
            seen: pictures that were looked at, by `id` and whether as squares; others are added.

        Raises:
            ValueError: as many places as there are not pictures.
        """
        layout, asked = self, turn
        if pictures:
            layout, asked = replace(self, encode=self._with_places), with_places(turn, len(pictures))
        ids = layout.ids(asked)
        places = [n for n, i in enumerate(ids) if i == PICTURE]
        if len(places) != len(pictures):
            raise ValueError(
                f"a conversation has {len(places)} places for {len(pictures)} pictures; write {MARK} once for each of them, or "
                "nowhere"
            )
        if not pictures:
            return [Span.text(ids, True)]
        assert self.network is not None  # `of` gives it
        square = len(pictures) > 1 if self.squares is None else self.squares
        seen = {} if seen is None else seen
        spans, start = list[Span](), 0
        for place, picture in zip(places, pictures, strict=True):
            if (key := (id(picture), square)) not in seen:
                seen[key] = self.network.spans(picture, square)
            spans += [Span.text(ids[start:place], True), *seen[key]]
            start = place + 1
        return [span for span in (*spans, Span.text(ids[start:], True)) if span.size]

    def _with_places(self, words: str) -> list[int]:
        first, *others = words.split(MARK)
        ids = [*self.encode(first)]
        for part in others:
            ids += [PICTURE, *self.encode(part)]
        return ids


def with_places(turn: Turn, count: int) -> Turn:
    """A question or conversation in which `count` pictures have places; ids are taken as they are.

    Raises:
        ValueError: a conversation in which the user says nothing.
    """
    if not isinstance(turn, str) and all(isinstance(part, int) for part in turn):
        return turn
    said: list[Any] = [{"role": "user", "content": turn}] if isinstance(turn, str) else list(turn)
    if any(MARK in message["content"] for message in said):
        return said
    first = next((n for n, message in enumerate(said) if message["role"] == "user"), None)
    if first is None:
        raise ValueError(
            "the conversation has pictures, but nothing that the user says; add a message with role 'user'"
        )
    said[first] = {"role": "user", "content": f"{MARK}\n" * count + said[first]["content"].strip()}
    return said
