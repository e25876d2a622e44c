"""What the settings of a training run may be: types, ranges and choices, checked before anything else happens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, get_type_hints

from unidiff.schema import check_value
from unidiff.train.config import LORA_TARGETS, RATES, TASKS, TRACKERS, WEIGHTS, TrainConfig


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, `low` itself only where `closed`."""

    low: float
    high: float
    closed: bool = True

    def holds(self, value: float) -> bool:
        return (self.low <= value if self.closed else self.low < value) and value <= self.high

    def asks(self, value: float) -> str:
        """What `value` must be."""
        if self.low == 0 and self.closed and value < 0:
            return "must not be negative"
        return f"must be {'at least' if self.closed else 'greater than'} {self.low:g} and at most {self.high:.15g}"


_COUNT, _OFF_OR_COUNT = Range(1, 2**20), Range(0, 2**20)
_STEPS, _OFF_OR_STEPS = Range(1, 10**12), Range(0, 10**12)
_SHARE, _BELOW_ONE = Range(0, 1), Range(0, 1 - 2**-40)
_POSITIVE, _AMOUNT = Range(0, 1e30, closed=False), Range(0, 1e30)
_TOKENS = Range(1, 2**24)

RANGES: dict[str, Range] = {
    "seed": Range(-(2**62), 2**62),
    "steps": _STEPS,
    "batch_size": _COUNT,
    "accumulate": _COUNT,
    "threads": Range(0, 1024),
    "max_bad_steps": _STEPS,
    "spike_factor": _AMOUNT,
    "data.validation_rows": Range(0, 2**40),
    "data.crop_fill": _SHARE,
    "data.image_size": Range(1, 2**15),
    "data.text_length": _TOKENS,
    "data.grid": Range(0, 2**12),
    "data.document_share": _SHARE,
    "data.pack": Range(0, 2**24),
    "objective.text_weight": _AMOUNT,
    "objective.image_weight": _AMOUNT,
    "objective.chunk": _TOKENS,
    "lora.rank": Range(0, 2**16),
    "lora.alpha": _POSITIVE,
    "lora.dropout": _BELOW_ONE,
    "optimiser.lr": _POSITIVE,
    "optimiser.muon_lr": _AMOUNT,
    "optimiser.beta1": _BELOW_ONE,
    "optimiser.beta2": _BELOW_ONE,
    "optimiser.eps": _POSITIVE,
    "optimiser.weight_decay": _AMOUNT,
    "optimiser.momentum": _BELOW_ONE,
    "optimiser.clip": _POSITIVE,
    "optimiser.state_bits": Range(8, 32),
    "schedule.warmup": _OFF_OR_STEPS,
    "schedule.decay": _SHARE,
    "schedule.floor": _SHARE,
    "ema.decay": _SHARE,
    "ema.warmup": _POSITIVE,
    "logging.every": _OFF_OR_STEPS,
    "logging.validate_every": _OFF_OR_STEPS,
    "logging.validation_draws": _COUNT,
    "logging.sample_every": _OFF_OR_STEPS,
    "logging.sample_steps": _COUNT,
    "logging.sample_guidance": Range(-1e6, 1e6),
    "logging.peak_tflops": _AMOUNT,
    "checkpoint.every": _OFF_OR_STEPS,
    "checkpoint.minutes": _AMOUNT,
    "checkpoint.keep": _COUNT,
    "parallel.replicas": _COUNT,
}
"""By setting; those of tasks are added below."""

CHOICES: dict[str, tuple[Any, ...]] = {
    "precision": ("bf16", "fp32"),
    "optimiser.name": ("adamw", "muon"),
    "optimiser.state_bits": (8, 32),
    "schedule.name": ("cosine", "wsd", "constant"),
    "checkpoint.export_dtype": ("bfloat16", "float16", "float32"),
    "checkpoint.changed": ("refuse", "allow"),
    "activation_checkpointing": ("none", "selective", "full"),
    "attention_kernel": ("sdpa", "flex"),
    "parallel.mode": ("ddp", "fsdp"),
    "parallel.param_dtype": ("float32", "bfloat16"),
    "parallel.reduce_dtype": ("float32", "bfloat16"),
}
for _task in TASKS:
    RANGES |= {f"tasks.{_task}.{name}": _AMOUNT for name in ("weight", "scale")}
    RANGES |= {f"tasks.{_task}.beta": Range(0, 1e6, closed=False), f"tasks.{_task}.dropout": _SHARE}
    CHOICES |= {f"tasks.{_task}.rate": RATES, f"tasks.{_task}.loss": WEIGHTS}


def leaves(settings: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted name, value, annotation) of every setting in nested dataclasses, in their order."""
    hints = get_type_hints(type(settings))
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
        if name in CHOICES and value not in CHOICES[name]:
            allowed = ", ".join(map(str, CHOICES[name]))
            raise ValueError(f"{name} = {value!r} is unknown; expected one of {allowed}")
        if name in RANGES and not RANGES[name].holds(value):
            raise ValueError(f"{name} = {value} {RANGES[name].asks(value)}")
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and "\0" in text:
                raise ValueError(f"{name} = {text!r} has a NUL character; leave it out")
    _check_lists(config)
    _check_together(config)


def _check_lists(config: TrainConfig) -> None:
    for name, allowed, found in (
        ("logging.trackers", TRACKERS, config.logging.trackers),
        ("lora.targets", LORA_TARGETS, config.lora.targets),
    ):
        for value in found:
            if value not in allowed:
                raise ValueError(f"{name} = {value!r} is unknown; expected one of {', '.join(allowed)}")
        if len(set(found)) < len(found):
            raise ValueError(f"{name} = {found} names something twice; leave one out")
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
        raise ValueError("no task has a weight above 0; set tasks.joint.weight or another")
    if config.objective.text_weight + config.objective.image_weight <= 0:
        raise ValueError("objective.text_weight and objective.image_weight are both 0; nothing would be learnt")
