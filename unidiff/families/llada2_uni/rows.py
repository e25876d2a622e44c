"""Rows and decoding of LLaDA2.0-Uni: pictures from words, edits, and questions about pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from unidiff.decoding.cache.sprint import SprintCache
from unidiff.decoding.config import Guidance, ModalityDecoding, SamplerConfig
from unidiff.families.layout import (
    DESCRIBE,
    DecodeRequest,
    Encode,
    Grid,
    Prepared,
    RowLayout,
    TaskInputs,
    TaskNeeds,
    check_compat,
    lay_out,
)
from unidiff.families.llada.rows import as_upstream
from unidiff.families.llada2.rows import BLOCK, block_answer, llada2_sampler
from unidiff.families.llada_moe import LING_CHAT
from unidiff.families.lumina import lumina_grid
from unidiff.tokens import Modality, Span, Vocabulary
from unidiff.tokens.text import refuse_holes

DRAW = "You are a text-to-image generation assistant."
EDIT = "You are an image editing assistant."
PIXELS = 512
"""Side of the largest square picture, as the image tokenizer sees it: 32 x 32 codes. What is drawn from them is larger."""
NUMBER = "<|reserved_token_{}|>"
LARGEST = 256  # rows or columns of codes that are looked for a mark
MARKS = {
    **dict(soi="<|image|>", eoi="<|/image|>", boi="<boi>", uncondition="<uncondition>"),
    **dict(role="<role>", end_role="</role>"),
}


def uni_image_sampler(
    block_length: int = BLOCK,
    steps: int = 16,
    guidance: float = 4.0,
    image_guidance: float | None = None,
    threshold: float = 0.95,
    rescale: float = 0.7,
    sprint: bool = False,
) -> SamplerConfig:
    """Upstream's decoding of pictures.

    Args:
        steps: passes of a block at most. threshold: all codes above it are written, if these are as many as the quota.
        guidance: s in uncond + s (cond - uncond). image_guidance: of edits, g in no words + s (both - no words) + g (no words -
            no picture); `Guidance.further` is 1 + g.
        rescale: see `Guidance`.
        sprint: the rule of upstream's "Sprint".
    """
    image = ModalityDecoding(
        rule="even_share" if sprint else "at_least", threshold=threshold, temperature=0.0, block_length=block_length,
        block_order="aligned", block_steps=steps,
    )  # fmt: skip
    further = () if image_guidance is None else (1 + image_guidance,)
    return SamplerConfig(image=image, guidance=Guidance(guidance, further=further, chained=True, rescale=rescale))


@dataclass(frozen=True)
class LLaDA2UniLayout(RowLayout):
    """Pictures of any size from words, edits, and questions about pictures; a caption is an answer.

    Rows are padded on the left; an unconditional row has its own padding before it, so that both have the same blocks of attention.

    Args:
        vocabulary: of the model. encode: text to ids without special ones.
        marks: ids of each of `MARKS`, and of numbers of rows and columns as `NUMBER` spells them.
        drawing, editing: ids of what the system says before a person's words. assistant: ids before what is answered.
        image, edits, text: sampler settings of pictures, edits and answers.
        ends: ids that end an answer, besides end-of-text.
        fixed: rows and columns of codes of every picture; None for any.
        compat: None, or "upstream": answers may hold any id, [MASK] and image codes too, and only end-of-text ends them;
            an unconditional prompt that is longer than the conditional one loses its beginning.
        sprint: with `compat`, upstream's "Sprint" with these settings, for everything but edits, as there.
    """

    vocabulary: Vocabulary
    encode: Encode
    marks: Mapping[str, Sequence[int]]
    drawing: Sequence[int]
    editing: Sequence[int]
    assistant: Sequence[int]
    image: SamplerConfig = field(default_factory=uni_image_sampler)
    edits: SamplerConfig = field(default_factory=lambda: uni_image_sampler(steps=8, image_guidance=0.0))
    text: SamplerConfig = field(default_factory=SamplerConfig)
    ends: tuple[int, ...] = ()
    fixed: Grid | None = None
    compat: str | None = None
    sprint: SprintCache | None = None
    family: str = "llada2-uni"
    sizes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_compat(self.compat)
        if self.sprint is not None and self.compat is None:
            raise ValueError(
                "sprint prunes what a block sees, as the reference program does; it goes with compat='upstream'"
            )

    @property
    def grid(self) -> Grid:
        return self.fit(PIXELS, PIXELS) if self.fixed is None else self.fixed

    @property
    def any_size(self) -> bool:
        return self.fixed is None

    def fit(self, height: int, width: int) -> Grid:
        return lumina_grid(height, width, PIXELS)

    @property
    def block(self) -> int:
        """Positions of a block of attention."""
        return self.image.image.block_length or BLOCK

    def text_to_image(self, inputs: TaskInputs) -> DecodeRequest:
        """Guidance leads away from the mark that stands for no words, or from other words."""
        grid, none = inputs.grid or self.grid, self.marks["uncondition"]
        negative = inputs.negative or [""] * inputs.count
        rows = []
        for text, away in zip(inputs.texts or (), negative, strict=True):
            prompts = (self._words(text), self._words(away) if away.strip() else none)
            rows.append([self._prompt(self.drawing, [], words, grid) for words in prompts])
        return self._drawn(rows, grid, inputs, self.image)

    def edit(self, inputs: TaskInputs) -> DecodeRequest:
        """Guided in two directions: without the words, and then without the picture. Where the second is off, it costs nothing."""
        assert inputs.codes is not None  # the pipeline gives them
        for name, given in (("mask_image", inputs.holes), ("reference", inputs.references)):
            if given is not None:
                raise ValueError(f"{self.family} edits whole pictures, one at a time; leave {name} out")
        height, width = inputs.codes.shape[1:]
        grid, none, rows = inputs.grid or (height, width), self.marks["uncondition"], []
        for text, codes in zip(inputs.texts or (), inputs.codes, strict=True):
            words, shown, hidden = self._words(text), self._picture(codes), [Span.text(self.marks["soi"], True)]
            prompts = ((shown, words), (shown, none), (hidden, words))
            rows.append([self._prompt(self.editing, seen, said, grid) for seen, said in prompts])
        return self._drawn(rows, grid, replace(inputs, codes=None), self.edits)

    def caption(self, inputs: TaskInputs) -> DecodeRequest:
        return self.answer(replace(inputs, texts=[DESCRIBE] * inputs.count))

    def answer(self, inputs: TaskInputs) -> DecodeRequest:
        assert inputs.codes is not None and inputs.texts is not None  # the pipeline gives both
        rows = []
        for codes, question in zip(inputs.codes, inputs.texts, strict=True):
            front = [*self._picture(codes, read=True), Span.text(self._words(question), True)]
            known = sum(span.size for span in front)
            rows.append([*front, *block_answer(known, inputs.longest, self.block, self.vocabulary)])
        config, never = self.text, [ids[0] for ids in self.marks.values() if len(ids) == 1]
        if self.sprint is not None:
            config = replace(config, text=replace(config.text, rule="even_share"))
        needs = TaskNeeds(tuple(never), self.ends) if self.compat is None else TaskNeeds()
        return lay_out(rows, config, needs, left=True)

    def prepared(self, pipe: Any, request: DecodeRequest, config: SamplerConfig, seeds: Tensor) -> Prepared:
        if self.compat is None:
            return super().prepared(pipe, request, config, seeds)
        words = not request.drawn
        policy = None if len(request.unconditional) > 1 else self.sprint
        if policy is not None and policy.first_code is None:
            policy = replace(policy, first_code=self.vocabulary.image[0])
        size = self.vocabulary.size
        every = replace(self.vocabulary, text=(0, size), image=(size, size)) if words else None
        return Prepared(
            pipe.transformer, request, as_upstream(config) if words else config, policy=policy, vocabulary=every
        )

    def _words(self, text: str) -> list[int]:
        refuse_holes([text], "prompt", "this family fills no <mask> holes")
        return list(self.encode(text))

    def _opening(self, grid: Grid) -> list[int]:
        """Before the codes of a picture: its rows and columns between marks."""
        missing = [side for side in grid if NUMBER.format(side) not in self.marks]
        if missing:
            raise ValueError(
                f"{self.family} has no mark for {missing[0]} rows or columns of codes; choose another size"
            )
        sides = [i for side in grid for i in self.marks[NUMBER.format(side)]]
        return [*self.marks["soi"], *sides, *self.marks["boi"]]

    def _picture(self, codes: Tensor, read: bool = False) -> list[Span]:
        """A known picture, int64 `[h, w]`, between its marks. read: it is given back."""
        height, width = codes.shape
        front, back = Span.text(self._opening((height, width)), True), Span.text(self.marks["eoi"], True)
        return [front, Span.codes(codes, self.vocabulary, read=read), back]

    def _prompt(self, system: Sequence[int], seen: Sequence[Span], words: Sequence[int], grid: Grid) -> list[Span]:
        """What stands before the codes of a picture to draw."""
        said = Span.words(words, self.vocabulary, read=True)
        end = Span.text([*self.assistant, *self._opening(grid)], True)
        return [Span.text(system, True), *seen, said, end]

    def _drawn(
        self, prompts: Sequence[Sequence[list[Span]]], grid: Grid, inputs: TaskInputs, config: SamplerConfig
    ) -> DecodeRequest:
        """Rows of prompts, each with those of its guidance streams, before pictures of one size."""
        streams: list[list[list[Span]]] = [[] for _ in prompts[0]]
        for number, own in enumerate(prompts):
            first = _size(own[0])
            if self.compat is not None:
                own = [_end_of(spans, first) for spans in own]
            more = max(map(_size, own)) - first
            front = first + more + -more % self.block  # whole blocks before the first prompt, where others are longer
            hidden = [inputs.picture(number, self.vocabulary, grid)]
            if rest := -(front + hidden[0].size) % self.block:
                hidden.append(Span.masked_image((1, rest), self.vocabulary))
            for rows, spans in zip(streams, own, strict=True):
                rows.append([*self._padding(front - _size(spans)), *spans, *hidden])
        if self.sprint is not None and len(streams) == 2:
            config = replace(config, image=replace(config.image, rule="even_share"))
        return lay_out(streams[0], config, others=streams[1:], left=True, drawn=True)

    def _padding(self, count: int) -> list[Span]:
        """Places before a prompt that nothing sees."""
        masks = torch.full((count,), self.vocabulary.mask_id)
        return [Span(masks, Modality.TEXT, True, exists=False)] if count else []


def _size(spans: Sequence[Span]) -> int:
    return sum(span.size for span in spans)


def _end_of(spans: list[Span], count: int) -> list[Span]:
    """The last tokens of a prompt, where it has more."""
    ids = [i for span in spans for i in span.ids.flatten().tolist()]
    return spans if len(ids) <= count else [Span.text(ids[-count:], True)]


def uni_layout(released: Any, texts: Any) -> LLaDA2UniLayout:
    """The layout of a loaded model and its tokenizer, in blocks of the model's attention; `ValueError` for a tokenizer without its marks."""
    known, vocabulary = texts.tokenizer.get_vocab(), released.vocabulary
    block = released.model.settings.block_length
    spelled = {**MARKS, **{NUMBER.format(n): NUMBER.format(n) for n in range(1, LARGEST + 1)}}
    marks = {name: [known[word]] for name, word in spelled.items() if word in known}
    marks |= {name: [vocabulary.specials[name]] for name in MARKS if name not in marks and name in vocabulary.specials}
    if absent := [word for name, word in MARKS.items() if name not in marks]:
        raise ValueError(f"the text tokenizer of llada2-uni has no {absent[0]}; give the one that it was trained with")

    def turn(role: str) -> list[int]:
        return [*marks["role"], *texts.encode(role), *marks["end_role"]]

    def system(says: str) -> list[int]:
        return [*turn("SYSTEM"), *texts.encode(f" {says} "), *turn("HUMAN")]

    return LLaDA2UniLayout(
        vocabulary,
        texts.encode,
        marks,
        *(system(DRAW), system(EDIT), turn("ASSISTANT")),
        image=uni_image_sampler(block),
        edits=uni_image_sampler(block, 8, image_guidance=0.0),
        text=llada2_sampler(vocabulary, block),
        ends=tuple(known[word] for word in (LING_CHAT.spelled["role_end"],) if word in known),
    )
