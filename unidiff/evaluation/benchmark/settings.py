"""How the tasks of EmojiEval are decoded in a benchmark: passes, thresholds, blocks, and the cases that judge them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from unidiff.decoding import SamplerConfig
from unidiff.pipelines.settings import with_overrides
from unidiff.worlds.emoji.cases import CATEGORIES
from unidiff.worlds.emoji.scenes import KINDS

QUALITY = {
    "text_to_image": "text_to_image",
    "caption": "caption_exact",
    "answer": "answer_accuracy",
    "inpaint": "inpainting",
    "generate": "joint_agreement",
}
"""Tasks, and which number of the report is their quality."""
USUAL = ("text_to_image", "caption", "answer", "inpaint")
"""Measured where no task is asked for."""
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
_TEXT = ("model", "threshold-0.5", "threshold-0.7", "passes-8", REFERENCE)
SWEEP = {
    "text_to_image": ("model", "passes-16", REFERENCE),
    "caption": _TEXT,
    "answer": _TEXT,
    "inpaint": ("model", "passes-2", "passes-3", "passes-8", REFERENCE),
    "generate": ("model", "passes-16", REFERENCE),
}
"""Settings of each task where none are asked for. Texts and holes are shorter than 32 tokens, so that 32 passes are 64."""


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
        if self.rule not in RULES:
            raise ValueError(f"the rule of a setting is {self.rule!r}; expected one of {', '.join(RULES)}")
        if (self.value is None) != (self.rule == "model"):
            raise ValueError(
                f"a setting with rule {self.rule!r} has the value {self.value}; write for instance passes-16"
            )
        if self.value is not None and not 0 <= self.value <= 2**20:
            raise ValueError(f"a setting has the value {self.value}; expected a number from 0 to {2**20}")
        if self.rule == "passes" and self.value is not None and self.value != int(self.value):
            raise ValueError(f"a setting has {self.value} passes; expected a whole number")
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
        targets = TARGETS[task]
        changed = config
        if self.rule == "passes" and self.value is not None:
            changed = with_overrides(config, steps=int(self.value))
        elif self.rule == "threshold" and self.value is not None:
            changed = with_overrides(config, threshold={targets[0]: self.value})
        elif self.rule == "factor":
            own: dict[str, Any] = {"rule": "factor", "factor": self.value}
            changed = replace(config, **{targets[0]: replace(getattr(config, targets[0]), **own)})
        if self.block is not None:
            changed = with_overrides(changed, block_length=dict.fromkeys(targets, self.block))
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


def decodes(task: str, config: SamplerConfig, names: Sequence[str] = ()) -> list[Decode]:
    """The settings of these names, or of `SWEEP`, those that come to the same decode together.

    Raises:
        ValueError: a name that cannot be read, or a value outside its range.
    """
    found: dict[SamplerConfig, tuple[Setting, ...]] = {}
    for setting in map(Setting.parse, names or SWEEP[task]):
        own = setting.config(config, task)
        found[own] = (*found.get(own, ()), setting)
    return [Decode(task, settings, own) for own, settings in found.items()]


def cases_per_part(task: str, prompts: int) -> int:
    """EmojiEval's n for which a task's quality has at least so many cases: it counts per category, and per kind of scene."""
    parts = {"text_to_image": len(CATEGORIES), "caption": len(KINDS)}.get(task, 1)
    return -(-prompts // parts)
