"""The tasks of released families under common names: each asks its family's rows for a request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from unidiff.families.chat import DREAM_CHAT, LLADA_CHAT, ChatRows, Turn
from unidiff.families.checkpoint.load import Released
from unidiff.families.lumina.grid import lumina_grid
from unidiff.families.lumina.rows import MARKS, LuminaRows
from unidiff.families.mmada.rows import MMaDARows
from unidiff.families.tasks import TaskRequest
from unidiff.families.unidisc.rows import UniDiscRows
from unidiff.families.unidisc.weights import unidisc_interleaved
from unidiff.pipelines.holes import MOST, all_have_holes, has_holes, short, split_holes
from unidiff.tokens.text import TextTokenizer
from unidiff.tokens.vocabulary import Vocabulary

Grid = tuple[int, int]
PIPELINE_FAMILIES = ("unidisc", "mmada", "lumina", "llada", "dream")
# how the released tokenizers spell the marks of the chat templates
LLADA_MARKS = {
    "bos": "<|startoftext|>",
    "start_header": "<|start_header_id|>",
    "end_header": "<|end_header_id|>",
    "eot": "<|eot_id|>",
}
DREAM_MARKS = {"im_start": "<|im_start|>", "im_end": "<|im_end|>"}
LONGEST = 64
DESCRIBE = "Please describe this image in detail."


@dataclass(frozen=True)
class FamilyTasks:
    """What a pipeline asks of a family: a request per task. A task that is not among `names` raises `ValueError`.

    Attributes:
        family: its name. names: the tasks that the model can do.
        sizes: whether pictures may have any size.
    """

    family: ClassVar[str]
    names: ClassVar[tuple[str, ...]]
    sizes: ClassVar[bool] = False

    @property
    def grid(self) -> Grid:
        """Rows and columns of codes of its pictures, or the usual ones; (0, 0) for a model of text alone."""
        return 0, 0

    @property
    def longest(self) -> int:
        """Tokens of a caption or an answer where nothing else is asked for."""
        return LONGEST

    def need(self, task: str) -> None:
        """Raise `ValueError` unless the model does the task."""
        if task not in self.names:
            raise self.refused(task)

    def refused(self, task: str) -> ValueError:
        return ValueError(f"{self.family} cannot do {task!r}; it does {', '.join(self.names)}")

    def fit(self, height: int, width: int) -> Grid:
        """Rows and columns of codes that a picture of any size in pixels is best brought to."""
        return self.grid

    def text_to_image(self, prompts: Sequence[str], grid: Grid) -> TaskRequest:
        raise self.refused("text_to_image")

    def caption(self, codes: Tensor, longest: int) -> TaskRequest:
        """As the answer to a question for one, where the family was trained so."""
        return self.answer(codes, [DESCRIBE] * len(codes), longest)

    def answer(self, codes: Tensor, questions: Sequence[str], longest: int) -> TaskRequest:
        raise self.refused("answer")

    def inpaint(self, texts: Sequence[str], codes: Tensor, holes: Tensor) -> TaskRequest:
        raise self.refused("inpaint")

    def edit(
        self, codes: Tensor, prompts: Sequence[str], grid: Grid | None, references: Tensor | None, holes: Tensor | None
    ) -> TaskRequest:
        raise self.refused("edit")

    def generate(self, texts: Sequence[str] | None, count: int, longest: int) -> TaskRequest:
        """`count` pairs of unknown words, or one for each of `texts`."""
        raise self.refused("generate")

    def chat(self, turns: Sequence[Turn], longest: int) -> TaskRequest:
        raise self.refused("chat")

    def complete(self, prompts: Sequence[str], longest: int) -> TaskRequest:
        raise self.refused("complete")

    def infill(self, texts: Sequence[str]) -> TaskRequest:
        raise self.refused("infill")


@dataclass(frozen=True)
class UniDiscTasks(FamilyTasks):
    """UniDisc: captions with `<mask>` holes and pictures, in any combination."""

    rows: UniDiscRows
    family: ClassVar[str] = "unidisc"
    names: ClassVar[tuple[str, ...]] = ("text_to_image", "caption", "inpaint", "generate")

    @property
    def grid(self) -> Grid:
        return self.rows.side, self.rows.side

    @property
    def longest(self) -> int:
        return min(LONGEST, self.rows.room)

    def text_to_image(self, prompts: Sequence[str], grid: Grid) -> TaskRequest:
        return self.rows.text_to_image(self._ids(prompts))

    def caption(self, codes: Tensor, longest: int) -> TaskRequest:
        return self.rows.caption(codes, longest)

    def inpaint(self, texts: Sequence[str], codes: Tensor, holes: Tensor) -> TaskRequest:
        return self.rows.inpaint(self._ids(texts), codes, holes)

    def generate(self, texts: Sequence[str] | None, count: int, longest: int) -> TaskRequest:
        return self.rows.generate(count, longest) if texts is None else self.rows.inpaint(self._ids(texts))

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids with [MASK] for holes; each piece by itself, as its tokenizer puts a space before every one."""
        return [_masked(text, self.rows, strip=True) for text in texts]


@dataclass(frozen=True)
class MMaDATasks(FamilyTasks):
    """MMaDA: pictures from words, questions about pictures, and text alone; a caption is an answer."""

    rows: MMaDARows
    family: ClassVar[str] = "mmada"
    names: ClassVar[tuple[str, ...]] = ("text_to_image", "caption", "answer", "inpaint", "chat")

    @property
    def grid(self) -> Grid:
        return self.rows.side, self.rows.side

    def text_to_image(self, prompts: Sequence[str], grid: Grid) -> TaskRequest:
        return self.rows.text_to_image(prompts)

    def answer(self, codes: Tensor, questions: Sequence[str], longest: int) -> TaskRequest:
        return self.rows.understand(codes, questions, longest)

    def inpaint(self, texts: Sequence[str], codes: Tensor, holes: Tensor) -> TaskRequest:
        if all_have_holes(texts):
            return self.rows.inpaint([_masked(t, self.rows) for t in texts], codes, holes)
        return self.rows.text_to_image(texts, codes, holes)

    def chat(self, turns: Sequence[Turn], longest: int) -> TaskRequest:
        questions = [turn for turn in turns if isinstance(turn, str)]
        if len(questions) < len(turns):
            raise ValueError("mmada answers one question at a time; give strings, not conversations")
        return self.rows.chat(questions, longest)


@dataclass(frozen=True)
class LuminaTasks(FamilyTasks):
    """Lumina-DiMOO: pictures of any size from words, edits, and questions about pictures; a caption is an answer.

    Args:
        pixels: side of the largest square that pictures of other shapes are brought to.
    """

    rows: LuminaRows
    pixels: int = 1024
    family: ClassVar[str] = "lumina"
    names: ClassVar[tuple[str, ...]] = ("text_to_image", "caption", "answer", "inpaint", "edit")
    sizes: ClassVar[bool] = True

    @property
    def grid(self) -> Grid:
        return self.fit(self.pixels, self.pixels)

    def fit(self, height: int, width: int) -> Grid:
        return lumina_grid(height, width, self.pixels)

    def text_to_image(self, prompts: Sequence[str], grid: Grid) -> TaskRequest:
        return self.rows.text_to_image(prompts, grid)

    def answer(self, codes: Tensor, questions: Sequence[str], longest: int) -> TaskRequest:
        return self.rows.understand(codes, questions, longest)

    def inpaint(self, texts: Sequence[str], codes: Tensor, holes: Tensor) -> TaskRequest:
        if all_have_holes(texts):
            return self.rows.inpaint([_masked(t, self.rows) for t in texts], codes, holes)
        return self.rows.text_to_image(texts, codes=codes, holes=holes)

    def edit(
        self, codes: Tensor, prompts: Sequence[str], grid: Grid | None, references: Tensor | None, holes: Tensor | None
    ) -> TaskRequest:
        return self.rows.edit(codes, prompts, grid, references, holes)


@dataclass(frozen=True)
class ChatTasks(FamilyTasks):
    """LLaDA and Dream: conversations, texts that go on, and texts with `<mask>` holes; one pass per token."""

    rows: ChatRows
    names: ClassVar[tuple[str, ...]] = ("chat", "complete", "infill")

    def chat(self, turns: Sequence[Turn], longest: int) -> TaskRequest:
        if not self.rows.template.marks:
            raise ValueError(
                f"the text tokenizer of this {self.family} has no marks for turns; give the one it was trained with "
                "(text_tokenizer=), or use complete, which needs none"
            )
        return _one_pass_each(self.rows.ask(turns, longest), longest)

    def complete(self, prompts: Sequence[str], longest: int) -> TaskRequest:
        return _one_pass_each(self.rows.complete(prompts, longest), longest)

    def infill(self, texts: Sequence[str]) -> TaskRequest:
        for line in texts:
            if not has_holes(line):
                raise ValueError(f"text {short(line)} is known in full; hide words with <mask> or <mask:n>")
        ids = [_masked(line, self.rows) for line in texts]
        request = _one_pass_each(self.rows.infill(ids), MOST)  # whatever the row: a quota makes no more than its holes
        text = replace(request.config.text, block_length=None)  # holes are no blocks
        return replace(request, config=replace(request.config, text=text))


class LLaDATasks(ChatTasks):
    """LLaDA's chat."""

    family: ClassVar[str] = "llada"


class DreamTasks(ChatTasks):
    """Dream's chat."""

    family: ClassVar[str] = "dream"


def tasks_of(released: Released, texts: TextTokenizer) -> FamilyTasks:
    """The tasks of a loaded model, with sizes from its config, or the released models' where it names none.

    Raises:
        ValueError: a family without a pipeline, or pictures that are no squares.
    """
    check_family(released)
    name, vocabulary, config = released.family.name, released.vocabulary, released.config
    assert vocabulary is not None  # all of these are denoisers
    if name == "unidisc":
        model, packed = config.get("config", config)["model"], unidisc_interleaved(config)
        side = _side(1024 if packed else model.get("img_length", 256))
        length = 128 if packed else model.get("txt_length", 128)
        return UniDiscTasks(UniDiscRows(vocabulary, texts.encode, side, length, packed))
    if name == "mmada":
        return MMaDATasks(MMaDARows(vocabulary, texts.encode, side=_side(config.get("num_vq_tokens", 1024))))
    known = texts.tokenizer.get_vocab()
    if name == "lumina":
        marks = {m: [known[m]] for m in MARKS} if all(m in known for m in MARKS) else None
        return LuminaTasks(LuminaRows(vocabulary, texts.encode, marks))
    template, spelled, kind = (
        (LLADA_CHAT, LLADA_MARKS, LLaDATasks) if name == "llada" else (DREAM_CHAT, DREAM_MARKS, DreamTasks)
    )
    ids = template.marks  # the released models'
    if set(spelled.values()) <= set(known):
        ids = {mark: known[word] for mark, word in spelled.items()}
    elif max(ids.values()) >= vocabulary.text_size:
        ids = {}
    return kind(ChatRows(vocabulary, replace(template, marks=ids), texts.encode))


def check_family(released: Released) -> None:
    """Raise `ValueError` for a family without a pipeline."""
    if released.family.name not in PIPELINE_FAMILIES:
        raise ValueError(
            f"{released.family.name} has no pipeline (those are {', '.join(PIPELINE_FAMILIES)}, muddit, meissonic); "
            "load it with unidiff.families.load_released and decode with its module"
        )


def _one_pass_each(request: TaskRequest, steps: int) -> TaskRequest:
    """One pass per token, as upstream recommends."""
    return replace(request, config=replace(request.config, text=replace(request.config.text, steps=steps)))


def _side(count: int) -> int:
    side = int(count**0.5)
    if side * side != count:
        raise ValueError(f"the config names {count} image codes; expected a square number")
    return side


def _masked(text: str, rows: UniDiscRows | MMaDARows | LuminaRows | ChatRows, strip: bool = False) -> list[int]:
    """Ids of a text with [MASK] for each hidden token."""
    encode, vocabulary, ids = rows.encode, rows.vocabulary, list[int]()
    assert encode is not None and isinstance(vocabulary, Vocabulary)  # a pipeline has a tokenizer
    for part in split_holes(text):
        if isinstance(part, int):
            ids += [vocabulary.mask_id] * part
        elif part.strip() or not strip:
            ids += encode(part.strip() if strip else part)
    return ids
