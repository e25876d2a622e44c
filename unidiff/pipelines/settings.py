"""What a pipeline knows besides its weights: the layout of a row and the sampler defaults of every task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

from unidiff.decoding import Guidance, ModalityDecoding, SamplerConfig
from unidiff.schema import Between, check_fields, from_data
from unidiff.tokens import Vocabulary

TASKS = ("text_to_image", "caption", "answer", "inpaint", "generate")
LONGEST_ROW = 2**20
"""Tokens of one row, text and picture together: no model here is anywhere near."""


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
            raise ValueError(
                f"text_length {self.text_length} and grid {self.grid} make rows of {tokens} tokens; "
                f"expected at most {LONGEST_ROW}"
            )
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
