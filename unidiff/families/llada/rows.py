"""LLaDA's decoding and chat template, and the rows of the models of words and pictures that come from it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

from unidiff.decoding.config import Guidance, ModalityDecoding, SamplerConfig
from unidiff.families.chat import ChatTemplate
from unidiff.families.layout import (
    DESCRIBE,
    DecodeRequest,
    Encode,
    RowLayout,
    TaskInputs,
    TaskNeeds,
    hidden_words,
    lay_out,
)
from unidiff.tokens import Span, Vocabulary
from unidiff.tokens.text import all_have_holes


def llada_sampler(
    vocabulary: Vocabulary,
    steps: int = 128,
    block_length: int = 32,
    temperature: float = 0.0,
    guidance: float = 0.0,
    threshold: float | None = None,
) -> SamplerConfig:
    """LLaDA's semi-autoregressive decoding (a fixed quota per block, ranked by probability), or Fast-dLLM's in parallel.

    Marks that only occur in prompts are never emitted.

    Args:
        steps: passes for the whole answer. block_length: tokens per block.
        guidance: upstream `cfg_scale`; the unconditional stream sees [MASK] for everything given.
        threshold: commit every token whose confidence reaches it instead of a fixed number per pass.
    """
    kept = {vocabulary.specials.get(name) for name in ("eos", "eot")}
    marks = tuple(sorted(i for i in vocabulary.specials.values() if i not in kept))
    rule: dict[str, Any] = {"steps": steps, "rule": "quota", "schedule": "fixed"}
    if threshold is not None:
        rule = {"rule": "threshold", "threshold": threshold}
    text = ModalityDecoding(temperature=temperature, block_length=block_length, forbid=marks, **rule)
    return SamplerConfig(text=text, guidance=Guidance(scale=1 + guidance, hide="given"))


def as_upstream(config: SamplerConfig) -> SamplerConfig:
    """Settings of a text as the programs of LLaDA, LLaDA-MoE and LLaDA2 have them: every id may be written, [MASK] too."""
    return replace(config, text=replace(config.text, writes_mask=True, forbid=()))


LLADA_CHAT = ChatTemplate(
    marks={"bos": 126080, "start_header": 126346, "end_header": 126347, "eot": 126348},
    opening=("<bos>",),
    turn=("<start_header>", "{role}", "<end_header>", "\n\n{content}", "<eot>"),
    answer=("<start_header>", "assistant", "<end_header>", "\n\n"),
    sampler=llada_sampler,
    spelled={
        "bos": "<|startoftext|>",
        "start_header": "<|start_header_id|>",
        "end_header": "<|end_header_id|>",
        "eot": "<|eot_id|>",
    },
)


class WordsAndPictures(RowLayout, ABC):
    """What MMaDA's and Lumina-DiMOO's rows share: pictures from words, guided away from others, and captions as answers."""

    encode: Encode
    nothing: ClassVar[tuple[str, ...]] = ()
    """Marks that stand for no words, where guidance leads away from none."""
    final: ClassVar[tuple[str, ...]]
    """Marks that end an answer."""
    described: ClassVar[str] = DESCRIBE
    """The question that a caption answers."""

    def text_to_image(self, inputs: TaskInputs) -> DecodeRequest:
        """Also the holes of given pictures: inside (inpainting) or around (outpainting)."""
        none = [self.vocabulary.specials[name] for name in self.nothing]
        negative = inputs.negative or [""] * inputs.count
        rows = [self._row(self._words(text), n, inputs) for n, text in enumerate(inputs.texts or ())]
        away = [self._row(self._words(text) if text.strip() else none, n, inputs) for n, text in enumerate(negative)]
        return lay_out(rows, self._drawing(), others=[away], left=True, drawn=True)

    def inpaint(self, inputs: TaskInputs) -> DecodeRequest:
        """Holes in prompts and pictures are filled together free-form and without guidance: the model was trained on
        either part alone, with the same [MASK].
        """
        if inputs.texts is None:
            raise ValueError(f"{self.family} needs the caption of the picture; give text=, with <mask> for holes")
        if not all_have_holes(inputs.texts):
            return self.text_to_image(inputs)
        config = SamplerConfig(replace(self._answers(1).text, block_length=None), self._drawing().image)
        needs = TaskNeeds((*self._never(), *self._ends(), self.vocabulary.specials["eos"]), stop_at_eos=False)
        rows = [self._row(self._words(text), n, inputs) for n, text in enumerate(inputs.texts)]
        return lay_out(rows, config, needs, left=True)

    def caption(self, inputs: TaskInputs) -> DecodeRequest:
        return self.answer(replace(inputs, texts=[self.described] * inputs.count))

    @abstractmethod
    def answer(self, inputs: TaskInputs) -> DecodeRequest:
        """Words about given pictures."""

    @abstractmethod
    def _row(self, words: Sequence[int | None], number: int, inputs: TaskInputs) -> list[Span]:
        """Words and the picture to draw of a row."""

    @abstractmethod
    def _drawing(self) -> SamplerConfig:
        """Settings of pictures."""

    @abstractmethod
    def _answers(self, length: int) -> SamplerConfig:
        """Settings of answers of so many tokens."""

    def _words(self, text: str) -> list[int | None]:
        return hidden_words(text, self.encode)

    def _ends(self) -> tuple[int, ...]:
        return tuple(self.vocabulary.specials[name] for name in self.final)

    def _never(self) -> tuple[int, ...]:
        """Marks that only prompts have."""
        return tuple(i for name, i in self.vocabulary.specials.items() if name not in ("eos", "eot", *self.final))
