"""What the settings of a training run may be, checked before anything else: their annotations, and what goes together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints

from unidiff.diffusion.schedules import SCHEDULES
from unidiff.models.trained_on import TASKS
from unidiff.schema import check_value
from unidiff.train.config import TrainConfig


def leaves(settings: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted name, value, annotation) of every setting in nested dataclasses, in their order."""
    hints = get_type_hints(type(settings), include_extras=True)
    for entry in fields(settings):
        value, name = getattr(settings, entry.name), f"{prefix}{entry.name}"
        if is_dataclass(hints[entry.name]):
            check_value(value, hints[entry.name], name)
            yield from leaves(value, f"{name}.")
        else:
            yield name, value, hints[entry.name]


def check_config(config: TrainConfig) -> None:
    """Raise ValueError with one sentence for the first setting that makes no sense."""
    for name, value, annotation in leaves(config):
        check_value(value, annotation, name)
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and "\0" in text:
                raise ValueError(f"{name} = {text!r} has a NUL character; leave it out")
    _check_lists(config)
    _check_together(config)


def _check_lists(config: TrainConfig) -> None:
    for name, found in (("logging.trackers", config.logging.trackers), ("lora.targets", config.lora.targets)):
        if len(set(found)) < len(found):
            raise ValueError(f"{name} = {found} names something twice; leave one out")
    rates = ("uniform", "beta", *SCHEDULES)
    for task in TASKS:
        if (rate := getattr(config.tasks, task).rate) not in rates:
            raise ValueError(f"tasks.{task}.rate = {rate!r} is unknown; expected one of {', '.join(rates)}")
    starts = []
    for entry in config.data.curriculum:
        if not (isinstance(entry, list) and len(entry) == 2):
            raise ValueError(f"data.curriculum entry {entry!r} is not of the form [fraction, highest level]")
        check_value(entry[0], float, f"data.curriculum: the fraction in {entry}")
        check_value(entry[1], int, f"data.curriculum: the level in {entry}")
        if not 0 <= entry[0] <= 1:
            raise ValueError(f"data.curriculum: the fraction in {entry} must lie in [0, 1]")
        starts.append(entry[0])
    if starts and (starts[0] != 0 or starts != sorted(set(starts))):
        raise ValueError(f"data.curriculum = {config.data.curriculum} must begin with fraction 0 and go up from there")


def _check_together(config: TrainConfig) -> None:
    if not config.output.strip():
        raise ValueError("output is empty; name the folder of the run, for instance output=out/run")
    if config.steps * config.rows_per_step >= 2**62:
        raise ValueError(
            f"steps = {config.steps} of {config.rows_per_step} samples are more than can be numbered; lower steps"
        )
    if config.parallel.replicas > 1 and config.parallel.mode != "fsdp":
        raise ValueError(f"parallel.replicas = {config.parallel.replicas} needs parallel.mode=fsdp")
    if config.data.documents and not 0 < config.data.document_share < 1:
        raise ValueError(f"data.document_share = {config.data.document_share} must lie between 0 and 1, without them")
    if config.spike_factor != 0 and config.spike_factor <= 1:
        raise ValueError(f"spike_factor = {config.spike_factor} must be above 1, or 0 to turn it off")
    if sum(getattr(config.tasks, t).weight for t in TASKS) <= 0:
        raise ValueError("no task has a weight above 0; set tasks.generate.weight or another")
    if config.objective.text_weight + config.objective.image_weight <= 0:
        raise ValueError("objective.text_weight and objective.image_weight are both 0; nothing would be learnt")
