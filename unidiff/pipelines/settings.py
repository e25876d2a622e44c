"""unidiff's own models: what a pipeline knows besides the weights, and its rows.

A row is a text span (task token, words, hidden tokens, end-of-text), then one image span.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Annotated, Any, ClassVar

from unidiff.decoding import Guidance, ModalityDecoding, SamplerConfig
from unidiff.families.layout import DecodeRequest, Grid, RowLayout, TaskInputs, TaskNeeds, hidden_words, lay_out
from unidiff.schema import Between, check_fields, from_data
from unidiff.tokens import Span, Vocabulary
from unidiff.tokens.text import TextTokenizer, note_on, short, unknown_words

TASKS = ("text_to_image", "caption", "answer", "inpaint", "generate")
LONGEST_ROW = 2**20  # tokens, text and picture together: no model here is anywhere near


def default_samplers() -> dict[str, SamplerConfig]:
    """Settings per task where a model brings none of its own: text by threshold, images by a cosine quota.

    Captions that are drawn (`generate`) are filled one token per pass at random positions, which draws from the model's own
    law. Committing the surest drawn tokens first favours captions that are sure everywhere, that is, plain ones.
    """
    text = ModalityDecoding(steps=16, rule="threshold", temperature=0.0)
    drawn_text = replace(text, rule="first_hitting", temperature=1.0, top_p=0.9)
    image = ModalityDecoding(steps=16, rule="quota", schedule="cosine", temperature=0.7, choice_temperature=1.0)
    return {
        "text_to_image": SamplerConfig(text, image, Guidance(2.0)),
        "caption": SamplerConfig(text, image),
        "answer": SamplerConfig(text, image),
        "inpaint": SamplerConfig(text, image),
        "generate": SamplerConfig(drawn_text, image, Guidance(1.0, hide="other"), order="text_first"),
    }


@dataclass(frozen=True)
class PipelineSettings:
    """Layout of a row (text span, then one image span) and defaults.

    Args:
        vocabulary: the shared id layout.
        text_length: tokens of the text span, task token and end-of-text fill included.
        grid: image codes per column and per row, `(height, width)`.
        task_tokens: names of the special text tokens that open a caption, open a question, and separate the answer.
        samplers: sampler settings per task (`TASKS`); tasks left out get `default_samplers`.
        num_candidates: decodes of each row per task, of which the best is kept; tasks left out decode once.
        tasks: those of `TASKS` that the model was trained for; None where nobody noted it, which counts as all.

    Raises:
        ValueError: a value of another type or outside its range; the message names it.
    """

    vocabulary: Vocabulary
    text_length: Annotated[int, Between(3)]
    grid: tuple[Annotated[int, Between(1)], Annotated[int, Between(1)]]
    task_tokens: Mapping[str, str] = field(
        default_factory=lambda: {name: name for name in ("caption", "question", "answer")}
    )
    samplers: Mapping[str, SamplerConfig] = field(default_factory=dict)
    num_candidates: Mapping[str, Annotated[int, Between(1)]] = field(default_factory=dict)
    tasks: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("grid", "tasks"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        check_fields(self, "")
        if (tokens := self.text_length + self.grid[0] * self.grid[1]) > LONGEST_ROW:
            made = f"text_length {self.text_length} and grid {self.grid} make rows of {tokens} tokens"
            raise ValueError(f"{made}; expected at most {LONGEST_ROW}")
        if self.tasks is not None and (unknown := set(self.tasks) - set(TASKS)):
            raise ValueError(f"tasks name unknown {sorted(unknown)}; expected some of {list(TASKS)}")
        if missing := {"caption", "question", "answer"} - set(self.task_tokens):
            raise ValueError(f"task_tokens lack {sorted(missing)}; name the special token of each")
        for name, per_task in (("samplers", self.samplers), ("num_candidates", self.num_candidates)):
            if unknown := set(per_task) - set(TASKS):
                raise ValueError(f"{name} name unknown tasks {sorted(unknown)}; expected some of {list(TASKS)}")
        object.__setattr__(self, "task_tokens", dict(self.task_tokens))
        object.__setattr__(self, "samplers", {**default_samplers(), **self.samplers})
        object.__setattr__(self, "num_candidates", dict(self.num_candidates))

    def sampler(self, task: str) -> SamplerConfig:
        """The default sampler settings of a task."""
        if task not in self.samplers:
            raise ValueError(f"unknown task {task!r}; expected one of {list(TASKS)}")
        return self.samplers[task]

    @property
    def trained(self) -> tuple[str, ...]:
        """The tasks that the model was trained for; all where nobody noted it."""
        return TASKS if self.tasks is None else tuple(task for task in TASKS if task in self.tasks)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able data; `from_dict` reads it back."""
        noted = {} if self.tasks is None else {"tasks": list(self.trained)}
        return noted | {
            "vocabulary": self.vocabulary.to_dict(),
            "text_length": self.text_length,
            "grid": list(self.grid),
            "task_tokens": dict(self.task_tokens),
            "samplers": {task: sampler.to_dict() for task, sampler in self.samplers.items()},
            "num_candidates": dict(self.num_candidates),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PipelineSettings:
        """Inverse of `to_dict`; an unknown or missing key is an error."""
        return from_data(cls, data, "pipeline settings")


@dataclass(frozen=True)
class NativeLayout(RowLayout):
    """Every task that a picture with its caption or a question has; one clear sentence where words do not fit.

    Args:
        texts: with the task tokens of `settings`.
        settings: spans, and settings of every task.
    """

    texts: TextTokenizer
    settings: PipelineSettings
    family: str = "a model of unidiff"
    all_words: ClassVar[bool] = True

    @property
    def vocabulary(self) -> Vocabulary:  # type: ignore[override]
        return self.settings.vocabulary

    @property
    def grid(self) -> Grid:
        return self.settings.grid

    @property
    def most(self) -> int:
        """Words (in tokens) that a caption can hold."""
        return self.settings.text_length - 1

    longest = most

    def check_parts(self, transformer: Any, images: Any, texts: Any) -> None:
        super().check_parts(transformer, images, texts)
        given = "give the one it was trained with"
        if (own := transformer.config.vocab_size) != self.vocabulary.size:
            raise ValueError(f"the transformer has {own} ids but the vocabulary {self.vocabulary.size}; {given}")
        if texts.size > self.vocabulary.text_size:
            fault = f"the text tokenizer has {texts.size} ids, but the model {self.vocabulary.text_size}"
            raise ValueError(f"{fault}; {given}")
        known = texts.specials()
        if missing := [name for name in self.settings.task_tokens.values() if name not in known]:
            raise ValueError(f"the text tokenizer has no special token {missing[0]!r}; it has {sorted(known)}")

    def candidates(self, task: str) -> int:
        return self.settings.num_candidates.get(task, 1)

    def note(self, task: str) -> str:
        if self.settings.tasks is None or task in self.settings.tasks:
            return ""
        others = ", ".join(self.settings.trained) or "nothing"
        return f"the model was not trained for {task}, so the result is likely noise; it was trained for {others}"

    def text_to_image(self, inputs: TaskInputs) -> DecodeRequest:
        captions, away = [self._caption(text) for text in inputs.texts or ()], None
        if inputs.negative is not None:
            unsaid = self._text([self._task["caption"], *[None] * self.most], known=True)
            away = [self._caption(text, "negative_prompt") if text.strip() else unsaid for text in inputs.negative]
        return self._request("text_to_image", captions, inputs, away)

    def caption(self, inputs: TaskInputs) -> DecodeRequest:
        return self._request("caption", [self._hidden(inputs.longest)] * inputs.count, inputs)

    def answer(self, inputs: TaskInputs) -> DecodeRequest:
        return self._request("answer", [self._question(text, inputs.longest) for text in inputs.texts or ()], inputs)

    def inpaint(self, inputs: TaskInputs) -> DecodeRequest:
        return self._holes("inpaint", inputs)

    def generate(self, inputs: TaskInputs) -> DecodeRequest:
        return self._holes("generate", inputs)

    @cached_property
    def _task(self) -> dict[str, int]:
        return {name: self.texts.special(token) for name, token in self.settings.task_tokens.items()}

    def _caption(self, text: str, what: str = "prompt") -> list[Span]:
        """Words, hidden tokens in place of holes, end-of-text fill."""
        ids = hidden_words(self.texts.normalised(text).strip(), self.texts.encode, self.most)
        if len(ids) > self.most:
            raise ValueError(
                f"{what} {short(text)} has {len(ids)} tokens, but this model holds at most {self.most}; shorten it"
                f"{self._hint(text)}"
            )
        return self._text([self._task["caption"], *ids])

    def _hidden(self, longest: int) -> list[Span]:
        """A caption of unknown words."""
        return self._text([self._task["caption"], *[None] * longest], filled=False)

    def _question(self, text: str, longest: int) -> list[Span]:
        """A known question and a hidden answer."""
        words = self.texts.encode(self.texts.normalised(text).strip())
        head = [self._task["question"], *words, self._task["answer"]]
        free = self.settings.text_length - len(head)
        if free < 1:
            raise ValueError(
                f"question {short(text)} has {len(words)} tokens, but this model holds questions of at most "
                f"{self.settings.text_length - 3} tokens; shorten it{self._hint(text)}"
            )
        return self._text([*head, *[None] * min(longest, free)], start=len(head), filled=False)

    def _hint(self, text: str) -> str:
        """Words that were never taught are spelt letter by letter, which makes many tokens of a few."""
        words = unknown_words([text], self.texts)
        return f" ({note_on(words, self.texts.known_words)})" if words else ""

    def _text(self, own: Sequence[int | None], start: int = 1, filled: bool = True, known: bool = False) -> list[Span]:
        """The text of a row.

        Args:
            own: the tokenizer's ids from the first position on, None where hidden.
            start: first position of the words that the caller gets back.
            filled: end-of-text, which is known, fills the span up; otherwise padding that the model never sees.
            known: nothing is decoded; hidden words stay [MASK].
        """
        vocabulary, first, fill = self.vocabulary, self.vocabulary.text[0], self.settings.text_length - len(own)
        ids = [None if i is None else i + first for i in own]
        spans = [Span.words(ids[:start], vocabulary), Span.words(ids[start:], vocabulary, read=True)]
        if known:
            spans = [replace(span, given=True) for span in spans]
        if filled:
            return [*spans, Span.text([self.texts.eos_id + first] * fill, True)]
        return [*spans, replace(Span.text([0] * fill), exists=False)]

    def _holes(self, task: str, inputs: TaskInputs) -> DecodeRequest:
        if inputs.texts is None:
            return self._request(task, [self._hidden(inputs.longest)] * inputs.count, inputs)
        return self._request(task, [self._caption(text, "text") for text in inputs.texts], inputs, closed=True)

    def _request(
        self,
        task: str,
        texts: Sequence[list[Span]],
        inputs: TaskInputs,
        away: Sequence[list[Span]] | None = None,
        closed: bool = False,
    ) -> DecodeRequest:
        """Rows of texts and pictures; `closed`: holes have a fixed number of tokens, so that end-of-text may not fill one."""
        eos, vocabulary = self.texts.eos_id, self.vocabulary
        never = [*(i for i in self._task.values() if i != eos), *([eos] if closed else [])]
        needs = TaskNeeds(tuple(i + vocabulary.text[0] for i in never))
        rows, *others = (
            [[*text, inputs.picture(number, vocabulary, self.grid)] for number, text in enumerate(stream)]
            for stream in ([texts] if away is None else [texts, away])
        )
        request = lay_out(rows, self.settings.samplers[task], needs, others, drawn=task == "text_to_image")
        # the task token stays visible, as in guidance training
        return replace(request, always_seen=request.batch.positions[..., 0] == 0)
