"""Lumina-DiMOO (arXiv 2510.06308): LLaDA's network under LLaDA's names; pictures of any size, editing, questions.

    prompt      <system> ... </system><user> words </user>        pictures go before the last id of the prompt
    picture     boi, then each row of codes and a newline, eoi
    answer      answer, a picture or text, /answer

The reference decodes one row at a time; here rows of any lengths and sizes go together, padded on the left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import Tensor

from unidiff.decoding.config import Guidance, ModalityDecoding, SamplerConfig
from unidiff.families.chat import answer_config
from unidiff.families.family import Family, Release, Tiny, config_names
from unidiff.families.layout import (
    DESCRIBE,
    DecodeRequest,
    Encode,
    Grid,
    RowLayout,
    TaskInputs,
    TaskNeeds,
    hidden_words,
    lay_out,
)
from unidiff.families.llada import CONFIG, EIGHT_BILLION, LLADA_NAMES, TINY_CONFIG, llada_settings
from unidiff.tokens import Span, Vocabulary
from unidiff.tokens.text import all_have_holes

UNIT, FACTOR = 32, 16  # pixels: of a crop's steps, of a code
LARGEST_RATIO = 4


def lumina_grid(height: int, width: int, pixels: int = 1024) -> tuple[int, int]:
    """Rows and columns of codes for a picture of any size: the crop that upstream chooses.

    Crops have sides in multiples of 32 pixels (two codes), at most `pixels`^2 in all and a ratio of at most 4. Of those
    on the border of what fits, the one that keeps the most of the picture's shape is taken; of equals the wider one.

    Args:
        height, width: in pixels. pixels: side of the largest square, a multiple of 32 (1024 to read, 512 to edit).

    Raises:
        ValueError: a size that is not positive, or `pixels` that is no multiple of 32.
    """
    if min(height, width) < 1 or pixels < UNIT or pixels % UNIT:
        raise ValueError(
            f"picture of {height}x{width} pixels in at most {pixels}^2; expected positive sizes and a multiple of {UNIT}"
        )
    most = (pixels // UNIT) ** 2
    border = {(w, h) for w in range(1, most + 1) for h in range(most // (w + 1), most // w + 1) if h}
    shapes = [shape for shape in border if max(shape) <= LARGEST_RATIO * min(shape)]

    def fit(shape: tuple[int, int]) -> tuple[float, int, int]:
        scales = shape[0] / width, shape[1] / height
        return min(scales) / max(scales), *shape

    columns, rows = max(shapes, key=fit)
    return rows * UNIT // FACTOR, columns * UNIT // FACTOR


MARKS = ("<system>", "</system>", "<user>", "</user>")
DRAW = "Generate an image according to the text prompt."
EDIT = "Generate an image applying the following editing instruction based on the original image."
ASK = (
    "You are a multimodal model that can process both text and images. Answer the following question based on the "
    "provided images. Analyze each image and combine relevant details to answer."
)
Words = Sequence[int | None]


def lumina_image_sampler(steps: int = 64, guidance: float = 4.0, image_guidance: float | None = None) -> SamplerConfig:
    """Upstream's image settings. (Its noise on the ranking has a constant temperature 1; here it falls with time.)

    Args:
        guidance: g in cond + g (cond - uncond). image_guidance: the same for the direction without the input pictures.
    """
    further = () if image_guidance is None else (1 + image_guidance,)
    image = ModalityDecoding(steps=steps, schedule="cosine", choice_temperature=1.0)
    return SamplerConfig(image=image, guidance=Guidance(scale=1 + guidance, further=further))


@dataclass(frozen=True)
class LuminaLayout(RowLayout):
    """Pictures of any size from words, edits, and questions about pictures; a caption is an answer.

    Args:
        vocabulary: of the model.
        encode: text to ids without special ones.
        marks: ids of each of `MARKS`, where the tokenizer has ids of their own for them; None for `encode`.
        image, edits, text: sampler settings of pictures, edits and answers.
        systems: what the system says before drawing, editing and answering.
        pixels: side of the largest square that pictures of other shapes are brought to.
        fixed: rows and columns of codes of every picture; None for any.
    """

    vocabulary: Vocabulary
    encode: Encode
    marks: Mapping[str, Sequence[int]] | None = None
    image: SamplerConfig = field(default_factory=lumina_image_sampler)
    edits: SamplerConfig = field(default_factory=lambda: lumina_image_sampler(guidance=2.5, image_guidance=4.0))
    text: SamplerConfig | None = None
    systems: tuple[str, str, str] = (DRAW, EDIT, ASK)
    pixels: int = 1024
    fixed: Grid | None = None
    family: str = "lumina"
    sizes: ClassVar[bool] = True

    @classmethod
    def of(cls, released: Any, texts: Any) -> LuminaLayout:
        """Of a loaded model."""
        known = texts.tokenizer.get_vocab()
        marks = {m: [known[m]] for m in MARKS} if all(m in known for m in MARKS) else None
        return cls(released.vocabulary, texts.encode, marks)

    @property
    def grid(self) -> Grid:
        return self.fit(self.pixels, self.pixels) if self.fixed is None else self.fixed

    @property
    def any_size(self) -> bool:
        return self.fixed is None

    def fit(self, height: int, width: int) -> Grid:
        return lumina_grid(height, width, self.pixels)

    def text_to_image(self, inputs: TaskInputs) -> DecodeRequest:
        """Also the holes of given pictures: inside (inpainting) or around (outpainting)."""
        system = self.systems[0]
        words = [self._words(text) for text in inputs.texts or ()]
        nothing = [self.vocabulary.specials["uncondition"]]
        away = [self._words(text) if text.strip() else nothing for text in inputs.negative or [""] * inputs.count]
        prompts, others = ([self._prompt(system, own) for own in column] for column in (words, away))
        return self._picture(prompts, [others], self._answers(inputs), self.image)

    def edit(self, inputs: TaskInputs) -> DecodeRequest:
        """Guided in two directions: without the words and without the input pictures."""
        assert inputs.codes is not None  # the pipeline gives them
        if inputs.holes is not None and inputs.grid is not None:
            raise ValueError("give either the size of a new picture, or a mask of the one that is changed")
        pictures = [part for part in (inputs.codes, inputs.references) if part is not None]
        shown = [[part[row] for part in pictures] for row in range(inputs.count)]
        words, system = [self._words(text) for text in inputs.texts or ()], self.systems[1]
        nothing = [self.vocabulary.specials["uncondition"]]
        prompts = [self._prompt(system, own, seen) for own, seen in zip(words, shown, strict=True)]
        no_words = [self._prompt(system, nothing, seen) for seen in shown]
        no_picture = [self._prompt(system, own) for own in words]
        if inputs.holes is None:
            height, width = inputs.codes.shape[1:]
            inputs = replace(inputs, codes=None, grid=inputs.grid or (height, width))
        return self._picture(prompts, [no_words, no_picture], self._answers(inputs), self.edits)

    def caption(self, inputs: TaskInputs) -> DecodeRequest:
        return self.answer(replace(inputs, texts=[DESCRIBE] * inputs.count))

    def answer(self, inputs: TaskInputs) -> DecodeRequest:
        assert inputs.codes is not None and inputs.texts is not None  # the pipeline gives both
        s, rows = self.vocabulary.specials, []
        for question, picture in zip(inputs.texts, inputs.codes, strict=True):
            prompt = self._prompt(self.systems[2], self._words(question), [picture], read=True)
            hidden = Span.words([None] * inputs.longest, self.vocabulary, read=True)
            rows.append([*prompt, Span.text([s["answer"]], True), hidden, Span.text([s["end_answer"]], True)])
        return lay_out(rows, self._text_settings(), TaskNeeds(self._never(), self._ends()), left=True)

    def inpaint(self, inputs: TaskInputs) -> DecodeRequest:
        """Holes in prompts and pictures are filled together free-form and without guidance: the model was trained on
        either part alone, with the same [MASK].
        """
        if inputs.texts is None:
            raise ValueError("lumina needs the caption of the picture; give text=, with <mask> for holes")
        if not all_have_holes(inputs.texts):
            return self.text_to_image(inputs)
        text = replace(self._text_settings().text, block_length=None)
        needs = TaskNeeds((*self._never(), *self._ends(), self.vocabulary.specials["eos"]), stop_at_eos=False)
        answers = self._answers(inputs)
        words, system = [self._words(text) for text in inputs.texts], self.systems[0]
        rows = [[*self._prompt(system, own), *answer] for own, answer in zip(words, answers, strict=True)]
        return lay_out(rows, SamplerConfig(text, self.image.image), needs, left=True)

    def _picture(
        self,
        prompts: Sequence[list[Span]],
        others: Sequence[Sequence[list[Span]]],
        answers: Sequence[list[Span]],
        config: SamplerConfig,
    ) -> DecodeRequest:
        streams = [
            [[*prompt, *answer] for prompt, answer in zip(own, answers, strict=True)] for own in (prompts, *others)
        ]
        return lay_out(streams[0], config, others=streams[1:], left=True, drawn=True)

    def _answers(self, inputs: TaskInputs) -> list[list[Span]]:
        """The picture of each row: new of a size, or a given one with holes."""
        s, answers = self.vocabulary.specials, []
        grid = None if inputs.codes is not None else inputs.grid or self.grid
        for row in range(inputs.count):
            image = inputs.picture(row, self.vocabulary, grid, s["newline"])
            front, back = [s["answer"], s["boi"]], [s["eoi"], s["end_answer"]]
            answers.append([Span.text(front, True), image, Span.text(back, True)])
        return answers

    def _prompt(self, system: str, words: Words, pictures: Sequence[Tensor] = (), read: bool = False) -> list[Span]:
        """The template with pictures (codes `[h, w]`) before its last id.

        Args:
            read: the picture is read back, not the words.
        """
        s, last = self.vocabulary.specials, self._mark("</user>")
        front = [*self._mark("<system>"), *self.encode(system), *self._mark("</system>"), *self._mark("<user>")]
        shown = []
        for picture in pictures:
            codes = Span.codes(picture, self.vocabulary, newline=s["newline"], read=read)
            shown += [Span.text([s["boi"]], True), codes, Span.text([s["eoi"]], True)]
        said = Span.words(words, self.vocabulary, read=not read)
        return [Span.text(front, True), said, Span.text(last[:-1], True), *shown, Span.text(last[-1:], True)]

    def _mark(self, name: str) -> list[int]:
        return list(self.encode(name) if self.marks is None else self.marks[name])

    def _words(self, text: str) -> list[int | None]:
        return hidden_words(text, self.encode)

    def _ends(self) -> tuple[int, ...]:
        return self.vocabulary.specials["end_answer"], self.vocabulary.specials["answer_pad"]

    def _never(self) -> tuple[int, ...]:
        """Marks that only prompts have."""
        ends = ("eos", "eot", "end_answer", "answer_pad")
        return tuple(i for name, i in self.vocabulary.specials.items() if name not in ends)

    def _text_settings(self) -> SamplerConfig:
        if self.text is not None:
            return self.text
        config = answer_config(self.vocabulary, steps=128, block_length=128)
        return replace(config, text=replace(config.text, forbid=()))  # the task says what is never written


# image codes behind LLaDA's text ids; the specials in between are prompt tokens, never targets
LUMINA_VOCABULARY = Vocabulary(
    size=134656,
    text=(0, 126356),
    image=(126356, 134548),
    mask_id=126336,
    specials={
        "eos": 126081,
        "newline": 126084,
        "answer_pad": 126339,
        "boi": 126349,
        "eoi": 126350,
        "uncondition": 126351,
        "answer": 126354,
        "end_answer": 126355,
    },
)
_CONFIG = {**CONFIG, "vocab_size": LUMINA_VOCABULARY.size, "embedding_size": LUMINA_VOCABULARY.size}

LUMINA = Family(
    name="lumina",
    fits=lambda config: config_names(config, "LLaDAForMultiModalGeneration"),
    settings=llada_settings,
    vocabulary=lambda config: LUMINA_VOCABULARY,
    vocabularies={"lumina": LUMINA_VOCABULARY},
    image_tokenizer="vq_model",
    releases=(Release("lumina-dimoo", _CONFIG, *EIGHT_BILLION),),
    tiny=Tiny(
        {"architectures": ["LLaDAForMultiModalGeneration"], **TINY_CONFIG},
        (0.0689936, 0.748344, 0.741017, 0.978048),
        Vocabulary(40, (0, 20), (24, 40), 21, specials={"eos": 19}),
    ),
    **LLADA_NAMES,
    layout=LuminaLayout.of,
)
