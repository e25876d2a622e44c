"""MMaDA (Yang et al. 2025, arXiv 2505.15809): LLaDA's network with text and image codes in one vocabulary.

    picture     <t2i> bos words eos soi codes eoi          padded on the left
    question    <mmu> soi codes eoi bos words answer       filled with eos, which is real: visible and a target
    chat        bos words answer
    both        <interleave> soi codes eoi bos words eos soi codes eoi bos answer       a picture is changed, MMaDA-Parallel-M
                <t2it> soi zeros eoi ...                                                a new one; zeros are id 0, not code 0

Code c is id offset + c with offset 126349 in the 8B checkpoints, the number of text ids: declared here, never found
from a tokenizer's length. Text and images share one [MASK]. Images are squares of MAGVIT-v2 codes. Questions are put into
the chat template.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Self, cast

import torch
from torch import Tensor

from unidiff.decoding.config import Guidance, ModalityDecoding, SamplerConfig
from unidiff.diffusion.schedules import get_schedule
from unidiff.families.chat import Message, Turn
from unidiff.families.family import Family, Release, Tiny, config_names
from unidiff.families.layout import DecodeRequest, Encode, Grid, Prepared, TaskInputs, TaskNeeds, lay_out, square_side
from unidiff.families.llada import CONFIG, EIGHT_BILLION, LLADA_NAMES, TINY_CONFIG, llada_settings
from unidiff.families.llada.rows import WordsAndPictures, llada_sampler
from unidiff.families.parallel import M_DEFECTS, AnswersTogether, JointSettings
from unidiff.families.upstream_order import in_upstream_order
from unidiff.schema import Between, check_fields
from unidiff.tokens import Span, Vocabulary

SPECIALS: Mapping[str, int] = {
    **dict(bos=126080, eos=126081, soi=126084, eoi=126085, sov=126086, eov=126087, t2i=126088, mmu=126089),
    **dict(t2v=126090, v2v=126091, lvg=126092, ipad=126093, r2i=126094, interleave=126095, t2it=126096),
    **dict(start_header=126346, end_header=126347, eot=126348),
}
# upstream's LLaDA fields of the 8B checkpoints
_FIELDS = ("d_model", "n_heads", "n_kv_heads", "n_layers", "mlp_hidden_size", "rope_theta", "rms_norm_eps")
RELEASED: Mapping[str, Any] = {**{name: CONFIG[name] for name in _FIELDS}, "new_vocab_size": 134656}


THINK = (
    "You should first think about the reasoning process in the mind and then provide the user with the answer. The reasoning "
    "process is enclosed within <think> </think> tags, i.e. <think> reasoning process here </think> answer here\n"
)
"""What the models were taught to think at, MMaDA-8B-MixCoT the longest: it stands before the question."""


def split_thought(text: str) -> tuple[str, str]:
    """The reasoning of an answer, and what is said behind it; no reasoning where the text has no `</think>`."""
    thought, mark, answer = text.rpartition("</think>")
    return (thought.replace("<think>", "", 1).strip(), answer.strip()) if mark else ("", text.strip())


def mmada_vocabulary(
    size: int = 134656,
    offset: int = 126349,
    codebook_size: int = 8192,
    mask_id: int = 126336,
    specials: Mapping[str, int] = SPECIALS,
) -> Vocabulary:
    """Text ids below `offset`, image codes from it on; rows past the last code are unused."""
    return Vocabulary(size, (0, offset), (offset, offset + codebook_size), mask_id, specials=specials)


def mmada_settings(config: Mapping[str, Any], released: Mapping[str, Any] = RELEASED) -> dict[str, Any]:
    """`MaskedTransformer` arguments for LLaDA's fields and `new_vocab_size`; those left out are the `released` ones."""
    fields = {**released, **config}
    return llada_settings({**fields, "embedding_size": fields["new_vocab_size"]})


@dataclass(frozen=True)
class ImageSettings:
    """Settings of text-to-image decoding.

    Args:
        steps: passes. guidance: g in (1 + g) conditional - g unconditional; 0 for none.
        temperature: of the Gumbel noise on log p(code), which decides what stays. schedule: see `ModalityDecoding`.
    """

    steps: Annotated[int, Between(1, 100_000)] = 15
    guidance: Annotated[float, Between(0, 1e6)] = 3.5
    temperature: Annotated[float, Between(0, 1e30)] = 1.0
    schedule: str = "cosine"

    def __post_init__(self) -> None:
        check_fields(self, "image")
        get_schedule(self.schedule)


def image_config(settings: ImageSettings) -> SamplerConfig:
    """Sampler settings for images; give the sampler the rows without captions as `unconditional`.

    The temperature of the choice noise falls from T to T / S; the reference's from T (1 - 1 / S) to 0.
    """
    image = ModalityDecoding(steps=settings.steps, schedule=settings.schedule, choice_temperature=settings.temperature)
    return SamplerConfig(image=image, guidance=Guidance(scale=1 + settings.guidance, hide="text"))


@dataclass(frozen=True)
class MMaDARows(WordsAndPictures):
    """Pictures from words, questions about pictures, and conversations; a caption is an answer.

    Args:
        vocabulary: of the model. encode: text to ids without special ones.
        text_length: tokens of a caption, bos and eos included.
        side: rows and columns of a picture (512 pixels: 32).
        image, text: settings; None for upstream's.
        thinking: whether questions ask for the reasoning first, see `THINK`.
    """

    vocabulary: Vocabulary
    encode: Encode
    text_length: int = 128
    side: int = 32
    image: ImageSettings | None = None
    text: SamplerConfig | None = None
    thinking: bool = False
    final: ClassVar[tuple[str, ...]] = ("eot",)
    usual: ClassVar[ImageSettings] = ImageSettings()

    @classmethod
    def of(cls, released: Any, texts: Any) -> Self:
        """Of a loaded model, with the size of its config."""
        side = square_side(released.config.get("num_vq_tokens", 1024))
        return cls(released.vocabulary, texts.encode, side=side)

    @property
    def grid(self) -> Grid:
        return self.side, self.side

    def answer(self, inputs: TaskInputs) -> DecodeRequest:
        assert inputs.codes is not None and inputs.texts is not None  # the pipeline gives both
        s, rows = self.vocabulary.specials, []
        for codes, question in zip(inputs.codes, inputs.texts, strict=True):
            picture = Span.codes(codes, self.vocabulary, read=True)
            front, asked = Span.text([s["mmu"], s["soi"]], True), Span.text([s["eoi"], *self.ids(question)], True)
            rows.append([front, picture, asked, self._hidden(inputs)])
        return lay_out(rows, self._answers(inputs.longest), TaskNeeds(self._never(), self._ends()))

    def chat(self, inputs: TaskInputs) -> DecodeRequest:
        rows = [[Span.text(self.conversation(turn), True), self._hidden(inputs)] for turn in inputs.turns or ()]
        return lay_out(rows, self._answers(inputs.longest), TaskNeeds(self._never(), self._ends()))

    def ids(self, question: str) -> list[int]:
        """A question about a picture in the template, with bos; the turn ends by letters, as in training (`<eot_id>`)."""
        asked = self._turn("user", f"{self._asked(question)}<eot_id>")
        return [self.vocabulary.specials["bos"], *asked, *self._turn("assistant", "")]

    def conversation(self, turn: Turn) -> list[int]:
        """A question or a conversation in the template, up to where the answer begins; ids are taken as they are."""
        if not isinstance(turn, str) and all(isinstance(part, int) for part in turn):
            return list(cast("Sequence[int]", turn))
        said = [{"role": "user", "content": turn}] if isinstance(turn, str) else cast("Sequence[Message]", turn)
        s = self.vocabulary.specials
        ids = [s["bos"]]
        for number, message in enumerate(said, 1):
            words = message["content"].strip()
            ids += self._turn(message["role"], self._asked(words) if number == len(said) else words)
            ids.append(s["eot"])
        return [*ids, *self._turn("assistant", "")]

    def _turn(self, role: str, words: str) -> list[int]:
        s = self.vocabulary.specials
        return [s["start_header"], *self.encode(role), s["end_header"], *self.encode(f"\n{words}")]

    def _asked(self, question: str) -> str:
        return f"{THINK}{question}" if self.thinking else question

    def _words(self, text: str) -> list[int | None]:
        return self._fitting(super()._words(text), self.text_length)

    def _fitting(self, words: list[int | None], most: int) -> list[int | None]:
        """The words; `ValueError` where they are more than `most` with bos and eos."""
        if len(words) + 2 > most:
            raise ValueError(f"the text needs {len(words) + 2} tokens and {most} fit; shorten it")
        return words

    def _row(self, words: Sequence[int | None], number: int, inputs: TaskInputs) -> list[Span]:
        s, v = self.vocabulary.specials, self.vocabulary
        front, between = Span.text([s["t2i"], s["bos"]], True), Span.text([s["eos"], s["soi"]], True)
        end = Span.text([s["eoi"]], True)
        return [front, Span.words(words, v, read=True), between, self._image(number, inputs), end]

    def _image(self, number: int, inputs: TaskInputs) -> Span:
        """The picture to draw of a row."""
        return inputs.picture(number, self.vocabulary, self.grid)

    def _drawing(self) -> SamplerConfig:
        return image_config(self.image or self.usual)

    def _answers(self, length: int) -> SamplerConfig:
        if self.text is not None:
            return self.text
        return llada_sampler(self.vocabulary, max(1, length // 2), max(1, length // 4))  # upstream's

    def _hidden(self, inputs: TaskInputs) -> Span:
        return Span.words([None] * inputs.longest, self.vocabulary, read=True)


@dataclass(frozen=True)
class MMaDALayout(AnswersTogether, MMaDARows):
    """Besides, words and a picture together.

    Args:
        joint: settings of words and a picture that are decoded together.
        compat: defects of MMaDA's program and MMaDA-Parallel-M's: "upstream" for all, or names of `parallel.DEFECTS`.
    """

    joint: JointSettings = field(default_factory=lambda: JointSettings(image_steps=30, guidance=3.5))
    compat: str | Sequence[str] | None = None
    family: str = "mmada"
    known_defects: ClassVar[tuple[str, ...]] = M_DEFECTS

    @property
    def words_beside(self) -> Mapping[str, int]:
        return {"generate": 255, "edit": 255}  # and bos

    def prepared(self, pipe: Any, request: DecodeRequest, config: SamplerConfig, seeds: Tensor) -> Prepared:
        ready = super().prepared(pipe, request, config, seeds)
        return in_upstream_order(ready, request) if "picture_order" in self.defects else ready

    def edit(self, inputs: TaskInputs) -> DecodeRequest:
        """A picture changed as told, and words; guided away from no picture and no words."""
        assert inputs.codes is not None  # the pipeline gives them
        if inputs.references is not None:
            raise ValueError(f"{self.family} changes one picture; leave reference out")
        return self.together(inputs if inputs.holes is not None else replace(inputs, codes=None), [inputs.codes])

    def together(self, inputs: TaskInputs, pictures: Sequence[Tensor] = ()) -> DecodeRequest:
        """Words stand behind the picture. One that is not there is id 0 for every code, as in training."""
        s, v = self.vocabulary.specials, self.vocabulary
        mark = "interleave" if pictures else "t2i" if "other_mark" in self.defects else "t2it"
        if mark not in s:
            raise ValueError(f"the ids of this {self.family} name no {mark!r}; load the released checkpoint again")
        nothing = Span.image(torch.zeros(self.grid, dtype=torch.long), True)
        front, between = Span.text([s[mark], s["soi"]], True), Span.text([s["eoi"]], True)
        rows, away = [], []
        for number, text in enumerate(inputs.texts or ()):
            words = [s["bos"], *self.encode(text), s["eos"]]
            blank = Span.text([s["bos"], *[s["eos"]] * (len(words) - 1)], True)
            shown = Span.codes(pictures[0][number], v) if pictures else nothing
            hidden, image = Span.words([None] * inputs.longest, v, read=True), inputs.picture(number, v, self.grid)
            answer = [Span.text([s["soi"]], True), image, Span.text([s["eoi"], s["bos"]], True), hidden]
            rows.append([front, shown, between, Span.text(words, True), *answer])
            away.append([front, nothing, between, blank, *answer])
        config = self.joint.sampler("fixed", "gumbel", self.defects)
        return lay_out(rows, config, self.needs(config), others=[away], left=True)


MMADA = Family(
    name="mmada",
    fits=lambda config: config_names(config, "MMadaModelLM", model_type="mmada") or "new_vocab_size" in config,
    settings=mmada_settings,
    default_config=lambda names: RELEASED,
    vocabulary=lambda config: mmada_vocabulary(),
    vocabularies={"mmada": mmada_vocabulary()},
    image_tokenizer="magvit",
    releases=tuple(
        Release(name, RELEASED, *EIGHT_BILLION) for name in ("mmada-8b", "mmada-8b-mixcot", "mmada-parallel-m")
    ),
    tiny=Tiny(
        {**TINY_CONFIG, "new_vocab_size": 40},
        (0.0315275, 0.731748, 0.736357, 0.731374),
        mmada_vocabulary(40, 24, 16, 21, {"eos": 19}),
    ),
    **LLADA_NAMES,
    layout=MMaDALayout.of,
)
