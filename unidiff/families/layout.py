"""What a pipeline asks of a family: rows for a task, its settings, what the task needs of any settings, how it is read back.

A `RowLayout` knows the tasks that it has methods for, which take `TaskInputs` and return a `DecodeRequest`, mostly by `lay_out`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from unidiff.decoding.cache.base import RefreshPolicy
from unidiff.decoding.commit.base import CommitRule, RuleMaker
from unidiff.decoding.config import SamplerConfig
from unidiff.tokens import Modality, Span, TokenBatch, Vocabulary
from unidiff.tokens.batch import moved, read_mask
from unidiff.tokens.text import MOST_TOKENS, split_holes

Grid = tuple[int, int]
Encode = Callable[[str], Sequence[int]]
LONGEST = 64
DESCRIBE = "Please describe this image in detail."
TASKS = ("text_to_image", "caption", "answer", "inpaint", "edit", "generate", "chat", "complete", "infill")


PLACES = ("words", "targets", "picture")


@dataclass(frozen=True)
class TaskInputs:
    """What a task was given, checked: plain values, one entry for each of B rows.

    `texts` are prompts, questions, captions (with `<mask>` holes where the task fills them) or texts to go on with.
    """

    count: int  # B
    texts: Sequence[str] | None = None  # None for unknown words
    negative: Sequence[str] | None = None  # what guidance leads away from, "" for what the family hides without one
    turns: Sequence[Any] | None = None  # questions and conversations of a chat
    codes: Tensor | None = None  # int64 [B, h, w], pictures; None for unknown ones
    holes: Tensor | None = None  # bool [B, h, w], codes to decode again
    pictures: Sequence[Sequence[Any]] | None = None  # PIL pictures of each row, for a family that `reads_pixels`
    references: Tensor | None = None  # int64 [B, h', w'], further pictures of an edit
    grid: Grid | None = None  # (rows, columns) of codes of the picture to draw, where the family draws any
    strength: float = 1.0  # share of the steps in which a picture is redrawn; less leaves more of it
    longest: int = LONGEST  # most tokens of a text to write
    told: bool = False  # whether `texts` say what to answer in words and a picture together

    def picture(self, row: int, vocabulary: Vocabulary, grid: Grid | None, newline: int | None = None) -> Span:
        """The picture of a row, which is read back: codes with holes, or a grid of unknown ones; newline: see `Span`."""
        if self.codes is None:
            return Span(torch.full(grid or (0, 0), vocabulary.image_mask), Modality.IMAGE, False, newline, read=True)
        if grid is not None and tuple(self.codes.shape[1:]) != grid:
            raise ValueError(f"codes have shape {tuple(self.codes.shape[1:])}; expected {grid}")
        holes = None if self.holes is None else self.holes[row]
        return Span.codes(self.codes[row], vocabulary, holes, newline=newline, read=True)


@dataclass(frozen=True)
class TaskNeeds:
    """What a task asks of any settings, a caller's own too: applied last, so that nothing undoes it."""

    forbid: tuple[int, ...] = ()  # text ids that are never written
    ends: tuple[int, ...] = ()  # further ids that end a text
    fill: int | None = None  # see `SamplerConfig`
    stop_at_eos: bool = True  # whether a text ends at its end; False where every hole is filled
    text_scale: float | None = (
        None  # guidance of words, where a scale for all is given and none for them; None for that
    )

    @lru_cache(maxsize=256)  # noqa: B019  # checking settings anew takes longer than a small model's rows do
    def keep_in(self, config: SamplerConfig) -> SamplerConfig:
        """The settings with what the task needs."""
        guidance = config.guidance
        if self.text_scale is not None and guidance.text_scale is None:
            guidance = replace(guidance, text_scale=self.text_scale)
        return replace(
            config,
            text=replace(config.text, forbid=tuple(sorted({*config.text.forbid, *self.forbid}))),
            ends=tuple(dict.fromkeys((*config.ends, *self.ends))),
            fill=config.fill if self.fill is None else self.fill,
            stop_at_eos=self.stop_at_eos,
            guidance=guidance,
        )


@dataclass(frozen=True)
class DecodeRequest:
    """B rows of a task, ready for the sampler."""

    batch: TokenBatch  # what is given and what is to be decoded
    config: SamplerConfig  # the family's settings for the task
    needs: TaskNeeds  # what the task asks of any settings
    words: Tensor  # bool [B, L], positions that the text of a row is read from
    picture: Tensor  # bool [B, L], codes of the picture that is given back, as many in each row
    unconditional: tuple[TokenBatch, ...] = ()  # rows of guidance streams where hiding given tokens does not make them
    always_seen: Tensor | None = None  # bool [B, L], given tokens never hidden; None leaves hiding to the sampler
    drawn: bool = False  # pictures are decoded and no text, so that a threshold is one of image codes
    strength: float = 1.0  # share of the steps in which a picture is redrawn, where the family can (`strengths`)

    def condition(self, hide: str) -> Tensor | None:
        """bool `[B, L]`: given positions that the guidance stream does not see; None leaves it to the sampler."""
        if self.always_seen is None or hide == "other":
            return None
        hidden = self.batch.given & self.batch.valid & ~self.always_seen
        if hide == "given":
            return hidden
        return hidden & (self.batch.modality == (Modality.TEXT if hide == "text" else Modality.IMAGE))

    def judged(self) -> Tensor:
        """bool `[B, L]`: the words that pictures are compared with, where one of several decodes is kept."""
        if self.always_seen is None:
            return self.words
        return self.batch.is_modality(Modality.TEXT) & ~self.always_seen

    def repeated(self, count: int, device: torch.device | str) -> DecodeRequest:
        """Each row `count` times in a row, on a device."""
        tries = torch.arange(len(self.batch.ids)).repeat_interleave(count)
        seen = None if self.always_seen is None else self.always_seen[tries]
        words, picture, seen = moved((self.words[tries], self.picture[tries], seen), device)
        batch, *others = (rows.rows(tries).to(device) for rows in (self.batch, *self.unconditional))
        return replace(self, batch=batch, words=words, picture=picture, unconditional=tuple(others), always_seen=seen)

    def finished(self, batch: TokenBatch, count: int) -> DecodeRequest:
        """The row that was kept of every `count`, decoded, in the host's memory."""
        words, picture = self.words[::count].cpu(), self.picture[::count].cpu()
        return DecodeRequest(batch.to("cpu"), self.config, self.needs, words, picture)

    def places(self, name: str) -> Tensor:
        """A tensor of one's own: `words` or `targets`, bool `[B, L]`, or `picture`, int64 `[B, h, w]`, where its codes lie in rows."""
        if name == "picture":
            rows, length = self.batch.shape
            return self.picture_ids(torch.arange(length, device=self.picture.device).repeat(rows, 1))
        return (self.batch.targets if name == "targets" else self.words).clone()

    def text_ids(
        self, ids: Tensor, vocabulary: Vocabulary, ends: Sequence[int], masks: bool = False
    ) -> list[list[int]]:
        """The texts of rows `[B, L]` as the tokenizer's ids, each up to before its first end; a [MASK] is one with `masks`."""
        stop, start = {*ends, vocabulary.specials.get("eos")}, vocabulary.text[0]
        words = self.words if masks else self.words & (ids != vocabulary.mask_id)
        texts = [row[chosen].tolist() for row, chosen in zip(ids, words, strict=True)]
        return [[i - start for i in row[: next((n for n, i in enumerate(row) if i in stop), None)]] for row in texts]

    def read_words(
        self, texts: Any, vocabulary: Vocabulary, given: Sequence[str] | None, ends: Sequence[int]
    ) -> tuple[list[list[int]], list[str]]:
        """Text ids and texts of decoded rows, by a text tokenizer; texts that were known come back as they were `given`."""
        text_ids = self.text_ids(self.batch.ids, vocabulary, ends)
        found = [texts.decode([i for i in words if i < texts.size]).strip() for words in text_ids]
        if given is None:
            return text_ids, found
        written = (self.words & self.batch.targets).any(1).tolist()
        return text_ids, [own if new else old.strip() for own, new, old in zip(found, written, given, strict=True)]

    def picture_ids(self, ids: Tensor) -> Tensor:
        """Ids of the pictures of rows `[..., B, L]`: int64 `[..., B, h, w]`, with h = w = 0 where there are none."""
        if not bool(self.picture.any()):
            return ids.new_zeros(*ids.shape[:-1], 0, 0)
        height, width = (self.batch.positions[self.picture][:, 1:].amax(0) + 1).tolist()
        return ids[..., self.picture].unflatten(-1, (len(self.picture), height, width))


def lay_out(
    rows: Sequence[Sequence[Span]],
    config: SamplerConfig,
    needs: TaskNeeds | None = None,
    others: Sequence[Sequence[Sequence[Span]]] = (),
    left: bool = False,
    **more: Any,
) -> DecodeRequest:
    """A request of rows of spans, of which those with `read` are given back, and of the rows of guidance streams.

    Args:
        others: rows for each stream, all padded to one length (on the `left`, so that their ends agree).
    """
    streams = [rows, *others]
    length = max((sum(span.size for span in row) for stream in streams for row in stream), default=0)
    batch, *rest = (TokenBatch.from_spans(stream, length, left=left) for stream in streams)
    read = read_mask(rows, length, left)
    words, picture = read & batch.is_modality(Modality.TEXT), read & batch.is_modality(Modality.IMAGE)
    return DecodeRequest(batch, config, needs or TaskNeeds(), words, picture, tuple(rest), **more)


def unseen(row: Sequence[Span], vocabulary: Vocabulary) -> list[Span]:
    """A row with [MASK] for everything given, as a guidance stream that hides all of it sees it."""
    masks = [vocabulary.mask_of(span.modality) for span in row]
    return [replace(s, ids=torch.where(torch.as_tensor(s.given), m, s.ids)) for s, m in zip(row, masks, strict=True)]


class Prepared(NamedTuple):
    """What decodes a request, see `RowLayout.prepared`.

    Args:
        rules: commit rules of the family's own, by modality. vocabulary: what may be drawn, where it is not the layout's.
        policy: its cache, where the caller asks for none.
    """

    model: Any
    request: DecodeRequest
    config: SamplerConfig
    rules: Mapping[Modality, CommitRule | RuleMaker] = MappingProxyType({})
    vocabulary: Vocabulary | None = None
    policy: RefreshPolicy | None = None


def check_compat(value: object) -> None:
    """Raise `ValueError` unless a layout's `compat` is None or "upstream"."""
    if value not in (None, "upstream"):
        raise ValueError(f"compat = {value!r:.80}; expected None or 'upstream'")


class RowLayout:
    """The rows of a family. Subclasses are frozen dataclasses with a method for each task that the model can do."""

    family: str  # its name
    vocabulary: Vocabulary  # its ids
    sizes: ClassVar[bool] = False  # whether a pipeline may be made for pictures of one size or another
    all_words: ClassVar[bool] = False  # whether the text tokenizer has all text ids
    latents: ClassVar[bool] = False  # whether pictures are continuous latents, drawn by flow matching, and no codes
    strengths: ClassVar[bool] = False  # whether a picture can be redrawn in a part of the steps
    reads_pixels: ClassVar[bool] = False  # whether pictures are read as they are, several in a row, and none are drawn
    conversations: ClassVar[bool] = True  # whether `chat` knows what was said before, where there is one

    @property
    def tasks(self) -> tuple[str, ...]:
        """What the model can do, names of `TASKS`."""
        return tuple(task for task in TASKS if hasattr(self, task))

    @property
    def modules(self) -> dict[str, Any]:
        """Further networks that read the rows, by name; they move with the pipeline."""
        return {}

    @property
    def grid(self) -> Grid:
        """Rows and columns of codes of a picture, the usual ones where there are others; (0, 0) without pictures."""
        return 0, 0

    @property
    def any_size(self) -> bool:
        """Whether pictures of any size are taken as they are."""
        return False

    @property
    def longest(self) -> int:
        """Most tokens of a text where nothing else is asked for."""
        return LONGEST

    @property
    def most(self) -> int:
        """Most tokens of a text that may be asked for."""
        return MOST_TOKENS

    @property
    def words_beside(self) -> Mapping[str, int]:
        """Of `generate` and `edit`, those that can answer a prompt in words and a picture together: tokens of the words where
        nothing else is asked for, 0 for a picture alone then."""
        return {}

    def usual_words(self, task: str, asked: int | None) -> int:
        """Of `words_beside`; `ValueError` where a task does not answer a prompt in words, but is to."""
        if task not in self.words_beside and (asked is not None or task == "generate"):
            wrong = "prompt" if task == "generate" else "max_text_tokens"
            raise ValueError(f"{task} of {self.family} answers no prompt in words and a picture; leave {wrong} out")
        return self.words_beside.get(task, 0)

    def check_parts(self, transformer: Any, images: Any, texts: Any) -> None:
        """Raise `ValueError` unless network and tokenizers (None for no pictures) have the ids of the vocabulary."""
        codes, vocabulary = 0 if images is None else images.codebook_size, self.vocabulary
        if codes != vocabulary.image_size:
            fault = f"the image tokenizer has {codes or 'no'} codes, but the model {vocabulary.image_size}"
            raise ValueError(f"{fault}; give the one it was trained with")
        least = vocabulary.text_size if self.all_words else 0
        if not least <= texts.size <= vocabulary.text_size + 1:  # with or without [MASK]; others leave ids unused
            fault = f"the text tokenizer has {texts.size} ids, but the model {vocabulary.text_size}"
            raise ValueError(f"{fault}; give the one it was trained with")

    def pictures(self, images: Any) -> Any:
        """Of a family with `latents`: the `PictureLatents` of a network, or themselves."""
        return images

    def candidates(self, task: str) -> int:
        """Decodes of each row of a task, of which the best is kept, where nothing else is asked for."""
        return 1

    def note(self, task: str) -> str:
        """What a person should know about a task that the weights do not do well; "" for nothing."""
        return ""

    def fit(self, height: int, width: int) -> Grid:
        """Rows and columns of codes that a picture of any size in pixels is best brought to."""
        return self.grid

    def prepared(self, pipe: Any, request: DecodeRequest, config: SamplerConfig, seeds: Tensor) -> Prepared:
        """The denoiser, rows and settings of one decode, where they depend on its number of passes or its seeds `[B]`."""
        return Prepared(pipe.transformer, request, config)

    def known(self, inputs: TaskInputs) -> DecodeRequest:
        """Rows of texts and pictures whose likelihood is asked for; one of the two may be unknown, and hidden then."""
        self.need("inpaint")
        request: DecodeRequest = self.inpaint(inputs)  # type: ignore[attr-defined]
        return request

    def need(self, task: str) -> None:
        """Raise `ValueError` unless the model does the task."""
        if task not in self.tasks:
            raise ValueError(f"{self.family} cannot do {task!r}; it does {', '.join(self.tasks)}")

    def request(self, task: str, inputs: TaskInputs) -> DecodeRequest:
        """The rows of a task; `ValueError` where the model cannot do it, words do not fit, or a code is none."""
        self.need(task)
        made: DecodeRequest = getattr(self, task)(inputs)
        return made


def hidden_words(text: str, encode: Encode, most: int = MOST_TOKENS, strip: bool = False) -> list[int | None]:
    """Ids of a text, None for each hidden token; errors as of `split_holes`. `strip`: of spaces, every piece by itself."""
    ids: list[int | None] = []
    for part in split_holes(text, most):
        if isinstance(part, int):
            ids += [None] * part
        elif part.strip() or not strip:
            ids += encode(part.strip() if strip else part)
    return ids


def square_side(count: int) -> int:
    """Rows of a square picture of so many codes; `ValueError` for another number."""
    side = math.isqrt(count)
    if side * side != count:
        raise ValueError(f"the config names {count} image codes; expected a square number")
    return side
