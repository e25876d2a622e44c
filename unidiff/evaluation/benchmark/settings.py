"""How the tasks of a trained model are decoded in a benchmark, and what a world adds: who judges, and on which cases."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from unidiff.decoding import SamplerConfig
from unidiff.evaluation.report import EvaluationReport
from unidiff.pipelines.options import DecodeOptions

TARGETS = {
    "text_to_image": ("image",),
    "caption": ("text",),
    "answer": ("text",),
    "inpaint": ("text", "image"),
    "generate": ("text", "image"),
}
"""Modalities that a task decodes."""
RULES = ("model", "passes", "threshold", "factor")
REFERENCE = "passes-64"
"""As good as one token per pass: a rule commits at least one, and no row has more than 64 tokens to decode."""


@dataclass(frozen=True)
class JudgedTasks:
    """What a world gives to the benchmark.

    Attributes:
        quality: tasks, and which number of the report is their quality.
        usual: tasks measured where none are asked for.
        sweep: names of the settings of each task where none are asked for, see `Setting.parse`.
        judge: (pipe, task, at least so many cases, seed, rows per decode, options) -> the report of one task.
        decode: (pipe, task, rows, seed, rows per decode, on_output, options) decodes some of these cases.
        yardstick: () -> a hash of all that the qualities depend on besides the model.
    """

    quality: Mapping[str, str]
    usual: tuple[str, ...]
    sweep: Mapping[str, tuple[str, ...]]
    judge: Callable[..., EvaluationReport]
    decode: Callable[..., None]
    yardstick: Callable[[], str]


@dataclass(frozen=True)
class Setting:
    """How the targets of a task are decoded; everything else is as the pipeline's own settings for the task say.

    Args:
        rule: `model`: the pipeline's settings; `passes`: a quota; `threshold`, `factor`: as `ModalityDecoding.rule`, for
            the text where the task decodes any.
        value: number of passes, threshold or factor.
        block: tokens per block; None leaves that as it is.

    Raises:
        ValueError: an unknown rule, or a value that is missing or not wanted.
    """

    rule: str = "model"
    value: float | None = None
    block: int | None = None

    def __post_init__(self) -> None:
        value, what = self.value, f"a setting with rule {self.rule!r}"
        if self.rule not in RULES:
            raise ValueError(f"the rule of a setting is {self.rule!r}; expected one of {', '.join(RULES)}")
        if (value is None) != (self.rule == "model"):
            raise ValueError(f"{what} has the value {value}; write for instance passes-16")
        if value is not None and not 0 <= value <= 2**20:
            raise ValueError(f"{what} has the value {value}; expected a number from 0 to {2**20}")
        if self.rule == "passes" and value != int(value or 0):
            raise ValueError(f"{what} has the value {value}; expected a whole number")
        if self.block is not None and not 1 <= self.block <= 2**20:
            raise ValueError(f"a setting has blocks of {self.block}; expected at least 1")

    @classmethod
    def parse(cls, name: str) -> Setting:
        """`model`, `passes-16`, `threshold-0.9`, `factor-1`; with `/16` behind it in blocks of 16.

        Raises:
            ValueError: another name.
        """
        head, _, block = name.partition("/")
        rule, _, value = head.partition("-")
        try:
            return cls(rule, float(value) if value else None, int(block) if block else None)
        except ValueError as error:
            raise ValueError(f"setting {name!r} cannot be read ({error})") from error

    @property
    def name(self) -> str:
        """What `parse` reads."""
        value = "" if self.value is None else f"-{self.value:g}"
        return f"{self.rule}{value}" + ("" if self.block is None else f"/{self.block}")

    def config(self, config: SamplerConfig, task: str) -> SamplerConfig:
        """A task's sampler with this setting for what the task decodes."""
        targets, value = TARGETS[task], self.value
        changed = config
        if value is not None and self.rule == "factor":
            own: dict[str, Any] = {"rule": "factor", "factor": value}
            changed = replace(config, **{targets[0]: replace(getattr(config, targets[0]), **own)})
        elif value is not None:
            asked = {"steps": int(value)} if self.rule == "passes" else {"threshold": {targets[0]: value}}
            changed = DecodeOptions(**asked).apply(config)  # type: ignore[arg-type]
        if self.block is not None:
            changed = DecodeOptions(block_length=dict.fromkeys(targets, self.block)).apply(changed)
        return replace(config, **{modality: getattr(changed, modality) for modality in targets})


@dataclass(frozen=True)
class Decode:
    """One way to decode a task.

    Attributes:
        settings: all that mean this decode. config: the sampler.
    """

    task: str
    settings: tuple[Setting, ...]
    config: SamplerConfig

    @property
    def name(self) -> str:
        """The settings' names, `a = b` where several are the same."""
        return " = ".join(dict.fromkeys(s.name for s in self.settings))

    @property
    def is_reference(self) -> bool:
        return any(s.name == REFERENCE for s in self.settings)


def decodes(task: str, config: SamplerConfig, names: Sequence[str]) -> list[Decode]:
    """The settings of these names, those that come to the same decode together.

    Raises:
        ValueError: a name that cannot be read, or a value outside its range.
    """
    found: dict[SamplerConfig, tuple[Setting, ...]] = {}
    for setting in map(Setting.parse, names):
        own = setting.config(config, task)
        found[own] = (*found.get(own, ()), setting)
    return [Decode(task, settings, own) for own, settings in found.items()]
