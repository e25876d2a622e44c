"""Dynin-Omni's rows, see `unidiff.families.dynin`, and what its program does otherwise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

from torch import Tensor

from unidiff.decoding.cache.base import Compat
from unidiff.decoding.config import Guidance, ModalityDecoding, SamplerConfig
from unidiff.families.dynin.upstream import with_prefix
from unidiff.families.layout import DecodeRequest, Grid, Prepared, TaskInputs, TaskNeeds, hidden_words, lay_out
from unidiff.families.llada.rows import llada_sampler
from unidiff.families.mmada import ImageSettings, MMaDARows, image_config
from unidiff.families.upstream_order import in_upstream_order
from unidiff.tokens import Span

Words = Sequence[int | None]


def both_config(steps: int = 18, image_steps: int = 18, guidance: float = 3.5) -> SamplerConfig:
    """Sampler settings for words and a picture together: words by a fixed quota of drawn tokens, codes as of pictures alone.

    Args:
        steps, image_steps: passes of the words and of the picture. guidance: g in (1 + g) conditional - g unconditional.
    """
    text = ModalityDecoding(steps=steps, schedule="fixed")
    image = ModalityDecoding(steps=image_steps, choice_temperature=1.0)
    return SamplerConfig(text, image, Guidance(scale=1 + guidance, hide="text"))


@dataclass(frozen=True)
class DyninLayout(MMaDARows):
    """Pictures from words, edits, questions about pictures, conversations, and edits that are answered in words as well.

    Pictures are squares of any size, as they are; `resize` brings them to the size at which the model was trained to read.

    Args:
        edits, both: settings of edits, and of words and a picture together; None for upstream's.
        seen: rows and columns of a picture that is resized to be read or edited (336 pixels: 21).
        fixed: rows and columns of every picture; None for `side` where one is drawn, and any where it is given.
        compat: None, or "upstream" for the defects of the reference, see `unidiff.families.dynin.upstream`.
        cuts: of `compat`, for pictures and edits: where the unconditional rows begin to be the conditional ones.
    """

    edits: ImageSettings | None = None
    both: SamplerConfig | None = None
    seen: int = 21
    fixed: Grid | None = None
    compat: Compat = None
    cuts: tuple[int, int] = (513, 337)
    family: str = "dynin"
    sizes: ClassVar[bool] = True
    described: ClassVar[str] = "Please describe this input in detail."
    usual: ClassVar[ImageSettings] = ImageSettings(steps=20)

    def __post_init__(self) -> None:
        if self.compat not in (None, "upstream"):
            raise ValueError(f"compat = {self.compat!r:.80}; expected None or 'upstream'")

    @property
    def grid(self) -> Grid:
        return self.fixed or (self.side, self.side)

    @property
    def any_size(self) -> bool:
        return self.fixed is None

    def fit(self, height: int, width: int) -> Grid:
        return self.fixed or (self.seen, self.seen)

    @property
    def words_beside(self) -> Mapping[str, int]:
        return {"edit": 0}

    def text_to_image(self, inputs: TaskInputs) -> DecodeRequest:
        request = super().text_to_image(inputs)
        if self.compat is None:
            return request
        codes = int(request.picture[0].sum())
        padding = self.text_length + 3 + codes - request.batch.shape[1]  # of upstream's rows, which all have one length
        return with_prefix(request, self.cuts[0] - padding)

    def answer(self, inputs: TaskInputs) -> DecodeRequest:
        self.check_shapes(inputs)
        return super().answer(inputs)

    def edit(self, inputs: TaskInputs) -> DecodeRequest:
        assert inputs.codes is not None and inputs.texts is not None  # the pipeline gives both
        self.check_shapes(inputs)
        if inputs.references is not None:
            raise ValueError(f"{self.family} changes a picture by words alone; leave reference out")
        if inputs.holes is not None and inputs.grid is not None:
            raise ValueError("give either the size of a new picture, or a mask of the one that is changed")
        if inputs.told:
            return self._answered(inputs)
        rows, away = (
            [self._edited(n, inputs, self._instruction(text)) for n, text in enumerate(texts)]
            for texts in (inputs.texts, [""] * inputs.count)
        )
        config = image_config(self.edits or ImageSettings(steps=64))
        request = lay_out(rows, config, others=[away], left=True, drawn=True)
        return request if self.compat is None else with_prefix(request, self.cuts[1])

    def chat(self, inputs: TaskInputs) -> DecodeRequest:
        share = max(1, inputs.longest // 4)
        config = self.text or llada_sampler(self.vocabulary, share, share, temperature=1.0)
        return replace(super().chat(inputs), config=config)

    def ids(self, question: str) -> list[int]:
        """A question about a picture stands as in a conversation."""
        return self.conversation(question)

    def prepared(self, pipe: Any, request: DecodeRequest, config: SamplerConfig, seeds: Tensor) -> Prepared:
        ready = super().prepared(pipe, request, config, seeds)
        return ready if self.compat is None else in_upstream_order(ready, request)

    def _answered(self, inputs: TaskInputs) -> DecodeRequest:
        """Words and a picture together; as the model was trained, or as upstream's program takes it."""
        rows, away = (
            [self._told(n, inputs, self._instruction(text)) for n, text in enumerate(texts)]
            for texts in (cast(Sequence[str], inputs.texts), [""] * inputs.count)
        )
        config, needs = self.both or both_config(), TaskNeeds(self._never(), self._ends())
        if self.compat is not None:
            text = replace(config.text, writes_mask=True)
            config = replace(config, text=text, image=replace(config.image, steps=1))
            needs = TaskNeeds(stop_at_eos=False)
        return lay_out(rows, config, needs, others=[away], left=True)

    def _told(self, number: int, inputs: TaskInputs, words: Words) -> list[Span]:
        s = self.vocabulary.specials
        front, hidden = self._source("ti2ti", number, inputs), self._hidden(inputs)
        target = self._picture(number, inputs)
        if self.compat is not None:
            return [
                *front,
                *self._padded(words),
                Span.text([s["soi"]], True),
                target,
                Span.text([s["eoi"]], True),
                hidden,
            ]
        said = Span.words([s["bos"], *words, s["eos"], s["soi"]], self.vocabulary)
        return [*front, said, target, Span.text([s["eoi"], s["bos"]], True), hidden]

    def _edited(self, number: int, inputs: TaskInputs, words: Words) -> list[Span]:
        s = self.vocabulary.specials
        soi, eoi = (Span.text([s[name]], True) for name in ("soi", "eoi"))
        front = self._source("i2i", number, inputs)
        return [*front, *self._padded(words, read=True), soi, self._picture(number, inputs), eoi]

    def _source(self, task: str, number: int, inputs: TaskInputs) -> list[Span]:
        """The picture that is changed, behind the mark of its task."""
        assert inputs.codes is not None
        s = self.vocabulary.specials
        front, behind = Span.text([s[task], s["soi"]], True), Span.text([s["eoi"]], True)
        return [front, Span.codes(inputs.codes[number], self.vocabulary), behind]

    def _picture(self, number: int, inputs: TaskInputs) -> Span:
        """The new picture: of the size that is asked for, or of the one that is changed; that one with holes for a mask."""
        assert inputs.codes is not None
        if inputs.holes is not None:
            return inputs.picture(number, self.vocabulary, None)
        height, width = inputs.codes.shape[1:]
        return replace(inputs, codes=None).picture(number, self.vocabulary, inputs.grid or (height, width))

    def _padded(self, words: Words, read: bool = False) -> list[Span]:
        """bos, words and eos behind padding whose places are counted, `text_length` + 1 in all."""
        s, free = self.vocabulary.specials, self.text_length - 1 - len(words)
        said = Span.words(words, self.vocabulary, read=read)
        nothing = replace(Span.text([0] * free), exists=False)
        return [nothing, Span.text([s["bos"]], True), said, Span.text([s["eos"]], True)]

    def _instruction(self, text: str) -> Words:
        return self._fitting(hidden_words(text, self.encode), self.text_length + 1)

    def _image(self, number: int, inputs: TaskInputs) -> Span:
        self.check_shapes(inputs)
        return inputs.picture(number, self.vocabulary, None if inputs.codes is not None else inputs.grid or self.grid)

    def check_shapes(self, inputs: TaskInputs) -> None:
        """Raise `ValueError` for pictures that are no squares."""
        shapes = [tuple(inputs.codes.shape[1:])] if inputs.codes is not None else []
        for height, width in [*shapes, *([inputs.grid] if inputs.grid is not None else [])]:
            if height != width:
                raise ValueError(
                    f"{self.family} knows square pictures only, and one has {height} x {width} codes; crop it, or let it be "
                    "resized (resize=True)"
                )

    def _answers(self, length: int) -> SamplerConfig:
        return self.text or llada_sampler(self.vocabulary, max(1, length // 2), length)

    def _never(self) -> tuple[int, ...]:
        thoughts = {self.vocabulary.specials.get(name) for name in ("think", "end_think")}
        return tuple(i for i in super()._never() if i not in thoughts)
