"""Lumina-DiMOO (arXiv 2510.06308): LLaDA's network under LLaDA's names; pictures of any size, editing, questions.

    prompt      <system> ... </system><user> words </user>        pictures go before the last id of the prompt
    picture     boi, then each row of codes and a newline, eoi
    answer      answer, a picture, text, or a picture and then text, /answer

MMaDA-Parallel-A has the same weights' names, sizes and ids, and answers in a picture and words together.

The reference decodes one row at a time; here rows of any lengths and sizes go together, padded on the left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import Tensor

from unidiff.decoding.config import Guidance, ModalityDecoding, SamplerConfig
from unidiff.families.family import Family, Release, Tiny, config_names
from unidiff.families.layout import DecodeRequest, Encode, Grid, TaskInputs, TaskNeeds, lay_out
from unidiff.families.llada import CONFIG, EIGHT_BILLION, LLADA_NAMES, TINY_CONFIG, llada_settings
from unidiff.families.llada.rows import llada_sampler
from unidiff.families.parallel import A_DEFECTS, AnswersTogether, JointSettings, overwritten
from unidiff.tokens import Span, Vocabulary

UNIT, FACTOR = 32, 16  # pixels: of a crop's steps, of a code
LARGEST_RATIO = 4


def lumina_grid(height: int, width: int, pixels: int = 1024) -> tuple[int, int]:
    """Rows and columns of codes for a picture of any size in pixels: the crop that upstream chooses.

    Crops have sides in multiples of 32 pixels (two codes), at most `pixels`^2 in all and a ratio of at most 4. Of those
    on the border of what fits, the one that keeps the most of the picture's shape is taken; of equals the wider one.

    Args:
        pixels: side of the largest square, a multiple of 32 (1024 to read, 512 to edit).
    """
    if min(height, width) < 1 or pixels < UNIT or pixels % UNIT:
        hint = f"expected positive sizes and a multiple of {UNIT}"
        raise ValueError(f"picture of {height}x{width} pixels in at most {pixels}^2; {hint}")
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
class LuminaLayout(AnswersTogether):
    """Pictures of any size from words, edits, and questions about pictures; a caption is an answer.

    Args:
        vocabulary: of the model. encode: text to ids without special ones.
        marks: ids of each of `MARKS`, where the tokenizer has ids of their own for them; None for `encode`.
        image, edits, text: sampler settings of pictures, edits and answers.
        systems: what the system says before drawing, editing and answering.
        pixels: side of the largest square that pictures of other shapes are brought to.
        fixed: rows and columns of codes of every picture; None for any.
        joint: settings of a picture and words that are decoded together.
        compat: defects of MMaDA-Parallel-A's program in these: "upstream" for all, or names of `parallel.DEFECTS`.
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
    joint: JointSettings = field(default_factory=JointSettings)
    compat: str | Sequence[str] | None = None
    family: str = "lumina"
    sizes: ClassVar[bool] = True
    nothing: ClassVar[tuple[str, ...]] = ("uncondition",)
    final: ClassVar[tuple[str, ...]] = ("end_answer", "answer_pad")
    known_defects: ClassVar[tuple[str, ...]] = A_DEFECTS

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

    @property
    def words_beside(self) -> Mapping[str, int]:
        return {"generate": 256, "edit": 0}

    def edit(self, inputs: TaskInputs) -> DecodeRequest:
        """Guided in two directions: without the words and without the input pictures. Told, words are answered as well."""
        assert inputs.codes is not None  # the pipeline gives them
        if inputs.holes is not None and inputs.grid is not None:
            raise ValueError("give either the size of a new picture, or a mask of the one that is changed")
        pictures = [part for part in (inputs.codes, inputs.references) if part is not None]
        if inputs.holes is None:
            height, width = inputs.codes.shape[1:]
            inputs = replace(inputs, codes=None, grid=inputs.grid or (height, width))
        if inputs.told:
            return self.together(inputs, pictures)
        nothing, streams = [self.vocabulary.specials["uncondition"]], []
        for number, text in enumerate(inputs.texts or ()):
            words, shown = self._words(text), [part[number] for part in pictures]
            prompts = ((words, shown), (nothing, shown), (words, ()))
            answer = self._answer(number, inputs)
            streams.append([[*self._prompt(self.systems[1], said, seen), *answer] for said, seen in prompts])
        rows, *others = map(list, zip(*streams, strict=True))
        return lay_out(rows, self.edits, others=others, left=True, drawn=True)

    def together(self, inputs: TaskInputs, pictures: Sequence[Tensor] = ()) -> DecodeRequest:
        """Words stand behind the picture."""
        s, streams, prompts = self.vocabulary.specials, [], []
        for number, text in enumerate(inputs.texts or ()):
            words, shown = self._words(text), [part[number] for part in pictures]
            said: list[tuple[Words, Sequence[Tensor]]] = [(words, shown), ([s["uncondition"]], shown), (words, ())]
            fronts = [self._prompt(self.systems[1], *own, silent=True) for own in said[: 3 if shown else 2]]
            begin, image, end = self._answer(number, inputs)
            hidden = Span.words([None] * inputs.longest, self.vocabulary, read=True)
            back = [replace(end, ids=end.ids[:1]), hidden, replace(end, ids=end.ids[1:])]  # eoi, words, /answer
            prompts.append(fronts[1:])
            streams.append([[*front, begin, image, *back] for front in fronts])
        rows, *others = map(list, zip(*streams, strict=True))
        config = self.joint.sampler("linear", "normal", self.defects, bool(pictures))
        request = lay_out(rows, config, self.needs(config, s["answer_pad"]), others, left=True)
        return overwritten(request, list(zip(*prompts, strict=True))) if "overwritten" in self.defects else request

    def answer(self, inputs: TaskInputs) -> DecodeRequest:
        assert inputs.codes is not None and inputs.texts is not None  # the pipeline gives both
        s, rows = self.vocabulary.specials, []
        for question, picture in zip(inputs.texts, inputs.codes, strict=True):
            prompt = self._prompt(self.systems[2], self._words(question), [picture], read=True)
            hidden = Span.words([None] * inputs.longest, self.vocabulary, read=True)
            rows.append([*prompt, Span.text([s["answer"]], True), hidden, Span.text([s["end_answer"]], True)])
        return lay_out(rows, self._answers(inputs.longest), TaskNeeds(self._never(), self._ends()), left=True)

    def _row(self, words: Words, number: int, inputs: TaskInputs) -> list[Span]:
        return [*self._prompt(self.systems[0], words), *self._answer(number, inputs)]

    def _answer(self, number: int, inputs: TaskInputs) -> list[Span]:
        """A picture: new of a size, or a given one with holes."""
        s = self.vocabulary.specials
        grid = None if inputs.codes is not None else inputs.grid or self.grid
        image = inputs.picture(number, self.vocabulary, grid, s["newline"])
        return [Span.text([s["answer"], s["boi"]], True), image, Span.text([s["eoi"], s["end_answer"]], True)]

    def _prompt(
        self, system: str, words: Words, pictures: Sequence[Tensor] = (), read: bool = False, silent: bool = False
    ) -> list[Span]:
        """The template with pictures (codes `[h, w]`) before its last id.

        Args:
            read: the picture is read back, not the words. silent: neither is.
        """
        s, last = self.vocabulary.specials, self._mark("</user>")
        front = [*self._mark("<system>"), *self.encode(system), *self._mark("</system>"), *self._mark("<user>")]
        shown = []
        for picture in pictures:
            codes = Span.codes(picture, self.vocabulary, newline=s["newline"], read=read)
            shown += [Span.text([s["boi"]], True), codes, Span.text([s["eoi"]], True)]
        said = Span.words(words, self.vocabulary, read=not read and not silent)
        return [Span.text(front, True), said, Span.text(last[:-1], True), *shown, Span.text(last[-1:], True)]

    def _mark(self, name: str) -> list[int]:
        return list(self.encode(name) if self.marks is None else self.marks[name])

    def _drawing(self) -> SamplerConfig:
        return self.image

    def _answers(self, length: int) -> SamplerConfig:
        if self.text is not None:
            return self.text
        config = llada_sampler(self.vocabulary, steps=128, block_length=128)
        return replace(config, text=replace(config.text, forbid=()))  # the task says what is never written


# the specials between text and codes are prompt tokens, never targets
_SPECIALS = {
    **dict(eos=126081, newline=126084, answer_pad=126339, boi=126349, eoi=126350),
    **dict(uncondition=126351, answer=126354, end_answer=126355),
}
LUMINA_VOCABULARY = Vocabulary(134656, (0, 126356), (126356, 134548), 126336, specials=_SPECIALS)
_CONFIG = {**CONFIG, "vocab_size": LUMINA_VOCABULARY.size, "embedding_size": LUMINA_VOCABULARY.size}

LUMINA = Family(
    name="lumina",
    fits=lambda config: config_names(config, "LLaDAForMultiModalGeneration"),
    settings=llada_settings,
    vocabulary=lambda config: LUMINA_VOCABULARY,
    vocabularies={"lumina": LUMINA_VOCABULARY},
    image_tokenizer="vq_model",
    releases=(Release("lumina-dimoo", _CONFIG, *EIGHT_BILLION), Release("mmada-parallel-a", _CONFIG, *EIGHT_BILLION)),
    tiny=Tiny(
        {"architectures": ["LLaDAForMultiModalGeneration"], **TINY_CONFIG},
        (0.0689936, 0.748344, 0.741017, 0.978048),
        Vocabulary(40, (0, 20), (24, 40), 21, specials={"eos": 19}),
    ),
    **LLADA_NAMES,
    layout=LuminaLayout.of,
)
