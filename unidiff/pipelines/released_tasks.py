"""The tasks of released families under common names: each asks its family's rows for a request."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor

from unidiff.released.loading import Released
from unidiff.released.lumina_tasks import MARKS, LuminaRows
from unidiff.released.mmada_tasks import MMaDARows
from unidiff.released.tasks import TaskRequest
from unidiff.released.unidisc import unidisc_interleaved
from unidiff.released.unidisc_tasks import UniDiscRows
from unidiff.tokens.text import TextTokenizer
from unidiff.tokens.vocabulary import Vocabulary

Grid = tuple[int, int]
PIPELINE_FAMILIES = ("unidisc", "mmada", "lumina")
DESCRIBE = "Please describe this image in detail."
_HOLE = re.compile(r" ?<mask(?::(\d+))?>")


class FamilyTasks(Protocol):
    """What a pipeline asks of a family. A task that is not among `names` raises `ValueError`.

    Attributes:
        names: the tasks that the model can do.
        sizes: whether pictures may have any size.
    """

    names: ClassVar[tuple[str, ...]]
    sizes: ClassVar[bool]

    @property
    def grid(self) -> Grid:
        """Rows and columns of codes of its pictures, or the usual ones."""
        ...

    def text_to_image(self, prompts: Sequence[str], grid: Grid) -> TaskRequest: ...

    def caption(self, codes: Tensor, longest: int) -> TaskRequest: ...

    def answer(self, codes: Tensor, questions: Sequence[str], longest: int) -> TaskRequest: ...

    def inpaint(self, texts: Sequence[str], codes: Tensor, holes: Tensor) -> TaskRequest: ...

    def generate(self, count: int, longest: int) -> TaskRequest: ...


@dataclass(frozen=True)
class UniDiscTasks:
    """UniDisc: captions with `<mask>` holes and pictures, in any combination."""

    rows: UniDiscRows
    names: ClassVar[tuple[str, ...]] = ("text_to_image", "caption", "inpaint", "generate")
    sizes: ClassVar[bool] = False

    @property
    def grid(self) -> Grid:
        return self.rows.side, self.rows.side

    def text_to_image(self, prompts: Sequence[str], grid: Grid) -> TaskRequest:
        return self.rows.text_to_image(prompts)

    def caption(self, codes: Tensor, longest: int) -> TaskRequest:
        return self.rows.caption(codes, longest)

    def answer(self, codes: Tensor, questions: Sequence[str], longest: int) -> TaskRequest:
        raise _refused("unidisc", "answer", self.names)

    def inpaint(self, texts: Sequence[str], codes: Tensor, holes: Tensor) -> TaskRequest:
        return self.rows.inpaint([_HOLE.sub(lambda m: f" <m{m[1] or ''}>", t) for t in texts], codes, holes)

    def generate(self, count: int, longest: int) -> TaskRequest:
        return self.rows.generate(count, longest)


@dataclass(frozen=True)
class MMaDATasks:
    """MMaDA: pictures from words, and questions about pictures; a caption is an answer."""

    rows: MMaDARows
    names: ClassVar[tuple[str, ...]] = ("text_to_image", "caption", "answer", "inpaint")
    sizes: ClassVar[bool] = False

    @property
    def grid(self) -> Grid:
        return self.rows.side, self.rows.side

    def text_to_image(self, prompts: Sequence[str], grid: Grid) -> TaskRequest:
        return self.rows.text_to_image(prompts)

    def caption(self, codes: Tensor, longest: int) -> TaskRequest:
        return self.answer(codes, [DESCRIBE] * len(codes), longest)

    def answer(self, codes: Tensor, questions: Sequence[str], longest: int) -> TaskRequest:
        return self.rows.understand(codes, questions, longest)

    def inpaint(self, texts: Sequence[str], codes: Tensor, holes: Tensor) -> TaskRequest:
        if any(_HOLE.search(text) for text in texts):
            return self.rows.inpaint([_masked(t, self.rows) for t in texts], codes, holes)
        return self.rows.text_to_image(texts, codes, holes)

    def generate(self, count: int, longest: int) -> TaskRequest:
        raise _refused("mmada", "generate", self.names)


@dataclass(frozen=True)
class LuminaTasks:
    """Lumina-DiMOO: pictures of any size from words, and questions about pictures; a caption is an answer."""

    rows: LuminaRows
    grid: Grid = (64, 64)
    names: ClassVar[tuple[str, ...]] = ("text_to_image", "caption", "answer", "inpaint")
    sizes: ClassVar[bool] = True

    def text_to_image(self, prompts: Sequence[str], grid: Grid) -> TaskRequest:
        return self.rows.text_to_image(prompts, grid)

    def caption(self, codes: Tensor, longest: int) -> TaskRequest:
        return self.answer(codes, [DESCRIBE] * len(codes), longest)

    def answer(self, codes: Tensor, questions: Sequence[str], longest: int) -> TaskRequest:
        return self.rows.understand(codes, questions, longest)

    def inpaint(self, texts: Sequence[str], codes: Tensor, holes: Tensor) -> TaskRequest:
        if any(_HOLE.search(text) for text in texts):
            return self.rows.inpaint([_masked(t, self.rows) for t in texts], codes, holes)
        return self.rows.text_to_image(texts, codes=codes, holes=holes)

    def generate(self, count: int, longest: int) -> TaskRequest:
        raise _refused("lumina", "generate", self.names)


def tasks_of(released: Released, texts: TextTokenizer) -> FamilyTasks:
    """The tasks of a loaded model, with sizes from its config, or the released models' where it names none.

    Raises:
        ValueError: a family without pictures, or pictures that are no squares.
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
    marks = {m: [known[m]] for m in MARKS} if all(m in known for m in MARKS) else None
    return LuminaTasks(LuminaRows(vocabulary, texts.encode, marks))


def check_family(released: Released) -> None:
    """Raise `ValueError` for a family without a pipeline."""
    if released.family.name not in PIPELINE_FAMILIES:
        raise ValueError(
            f"{released.family.name} has no pipeline (those are {', '.join(PIPELINE_FAMILIES)}, muddit, meissonic); "
            "load it with unidiff.released.load_released and decode with its module"
        )


def _refused(family: str, task: str, names: Sequence[str]) -> ValueError:
    return ValueError(f"{family} cannot do {task!r}; it does {', '.join(names)}")


def _side(count: int) -> int:
    side = int(count**0.5)
    if side * side != count:
        raise ValueError(f"the config names {count} image codes; expected a square number")
    return side


def _masked(text: str, rows: MMaDARows | LuminaRows) -> list[int]:
    """Ids of a text with [MASK] for each hidden token."""
    encode, vocabulary, ids, place = rows.encode, rows.vocabulary, list[int](), 0
    assert encode is not None and isinstance(vocabulary, Vocabulary)  # a pipeline has a tokenizer
    for hole in [*_HOLE.finditer(text), None]:
        ids += encode(text[place : None if hole is None else hole.start()])
        if hole is not None:
            ids += [vocabulary.mask_id] * int(hole[1] or 1)
            place = hole.end()
    return ids
