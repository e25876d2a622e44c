"""UniDisc's rows: a caption with holes and a picture, any part of which is decoded with the rest given.

    static          bos words eos pad...                                 codes         (text_length + side^2 tokens)
    interleaved     bos system eos words <image> codes eos                             (padding is invisible)

Static padding is ordinary text that attention sees, so a row has one length and a finished text is followed by padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from unidiff.decoding.config import Guidance, ModalityDecoding, SamplerConfig
from unidiff.families.checkpoint.config_keys import ConfigError, section
from unidiff.families.family import Config
from unidiff.families.layout import (
    DecodeRequest,
    Encode,
    Grid,
    RowLayout,
    TaskInputs,
    TaskNeeds,
    hidden_words,
    lay_out,
    square_side,
    unseen,
)
from unidiff.tokens import Span, Vocabulary

SYSTEM = "You are a highly intelligent multimodal AI with the ability to analyze and generate images."
PAD = 0  # LLaMA-2's <unk>, which fills the static text
Slot = Sequence[int | None]


def unidisc_sampler(steps: int = 50, guidance: float = 3.0, ramp: bool = True) -> SamplerConfig:
    """UniDisc's default sampler: MaskGIT with Gumbel noise 4.5 t on the ranking, weight `guidance` (1 - t).

    Args:
        steps: passes. guidance: w in (1 + w) cond - w uncond, where uncond hides everything given; 0 for none.
        ramp: the weight grows with progress; False for a constant one.
    """
    decoding = ModalityDecoding(steps=steps, rule="quota", schedule="cosine", choice_temperature=4.5)
    mode = "ramp" if ramp else "constant"
    return SamplerConfig(decoding, decoding, Guidance(scale=1 + guidance, mode=mode, hide="given"))


def unidisc_interleaved(config: Config) -> bool:
    """Whether a configuration is of the interleaved layout."""
    packed = section(config.get("config", config), "data").get("require_sample_ids")
    if not (packed is None or isinstance(packed, bool)):
        raise ConfigError(f"config data.require_sample_ids is {packed!r}; expected true or false")
    return bool(packed)


@dataclass(frozen=True)
class UniDiscLayout(RowLayout):
    """Captions with holes and pictures, in any combination.

    Args:
        vocabulary: of the model. encode: text to ids without special ones.
        side: rows and columns of a picture.
        text_length: static: tokens of the text, bos and eos included. Interleaved: the most a caption may have.
        interleaved: which of the two layouts.
        system: the sentence of the interleaved layout.
        config: sampler settings.
    """

    vocabulary: Vocabulary
    encode: Encode
    side: int = 16
    text_length: int = 128
    interleaved: bool = False
    system: str = SYSTEM
    config: SamplerConfig = field(default_factory=unidisc_sampler)
    family: str = "unidisc"
    all_words: ClassVar[bool] = True

    @classmethod
    def of(cls, released: Any, texts: Any) -> UniDiscLayout:
        """Of a loaded model, with the sizes of its config."""
        model, packed = released.config.get("config", released.config)["model"], unidisc_interleaved(released.config)
        if packed and "image" not in released.vocabulary.specials:
            raise ValueError(
                "the ids of this unidisc name no mark of pictures, which its interleaved rows have; it draws none"
            )
        side = square_side(1024 if packed else model.get("img_length", 256))
        length = 128 if packed else model.get("txt_length", 128)
        return cls(released.vocabulary, texts.encode, side, length, packed)

    @property
    def grid(self) -> Grid:
        return self.side, self.side

    @property
    def most(self) -> int:
        return self.text_length - (0 if self.interleaved else 2)  # bos, eos

    @property
    def longest(self) -> int:
        return min(super().longest, self.most)

    def text_to_image(self, inputs: TaskInputs) -> DecodeRequest:
        return replace(self.inpaint(inputs), drawn=True)

    def caption(self, inputs: TaskInputs) -> DecodeRequest:
        return self.inpaint(inputs)

    def generate(self, inputs: TaskInputs) -> DecodeRequest:
        request = self.inpaint(inputs)
        if inputs.texts is not None:
            return request
        guidance = replace(request.config.guidance, hide="other")
        return replace(request, config=replace(request.config, guidance=guidance))

    def inpaint(self, inputs: TaskInputs) -> DecodeRequest:
        """Every task: what is known of texts and pictures is given, and the rest is decoded."""
        open_text, s = inputs.texts is None, self.vocabulary.specials
        slots = [None] * inputs.count if inputs.texts is None else [self._slot(text) for text in inputs.texts]
        never = {PAD, s["bos"], *(() if open_text else (s["eos"],)), *((s["image"],) if self.interleaved else ())}
        needs = TaskNeeds(tuple(never), fill=None if self.interleaved else PAD, stop_at_eos=open_text)
        rows = [self._row(slot, number, inputs) for number, slot in enumerate(slots)]
        away = []
        for number, text in enumerate(inputs.negative or ()):
            other = self._row(self._slot(text), number, inputs)
            away.append(other if text.strip() else unseen(rows[number], self.vocabulary))
        return lay_out(rows, self.config, needs, [away] if away else [], left=bool(away))

    def _slot(self, text: str) -> list[int | None]:
        """Ids of the words, None for a hole; each piece by itself, as the tokenizer puts a space before every one."""
        words = hidden_words(text, self.encode, strip=True)
        if len(words) > self.most:
            raise ValueError(f"the prompt has {len(words)} tokens, but {self.most} fit; shorten it")
        return words

    def _row(self, slot: Slot | None, number: int, inputs: TaskInputs) -> list[Span]:
        """A row; an unknown text (None) of as many words as asked for, and in the static layout its end."""
        s, known = self.vocabulary.specials, slot is not None
        words = [None] * inputs.longest if slot is None else slot
        text = Span.words(words, self.vocabulary, read=True)
        image = inputs.picture(number, self.vocabulary, self.grid)
        if self.interleaved:
            front = [s["bos"], *self.encode(self.system), s["eos"]]
            return [Span.text(front, True), text, Span.text([s["image"]], True), image, Span.text([s["eos"]], True)]
        end = Span.words([s["eos"] if known else None], self.vocabulary)
        fill = [PAD] * (self.text_length - 2 - len(words))
        return [Span.text([s["bos"]], True), text, end, Span.text(fill, True), image]
