"""What a run may change when it goes on from a checkpoint, and what makes it another run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from unidiff.errors import reading
from unidiff.models.config import TransformerConfig
from unidiff.models.trained_on import FORMER_TASKS
from unidiff.schema import from_data
from unidiff.train.config import ScheduleConfig, TrainConfig, leaves
from unidiff.train.data.shard_source import DocumentTokens, WeightedShards
from unidiff.train.data.source import TokenSource, TokenTable
from unidiff.train.optim import learning_rate_factor
from unidiff.train.run.checkpoint import RunCheckpoint
from unidiff.train.step import TrainState

_REASONS = {
    "the same numbers but for rounding": (
        "device threads compile attention_kernel objective.chunk parallel.mode parallel.replicas parallel.reshard"
    ),
    "what is computed again comes out the same": "activation_checkpointing",
    "says what happens, and changes nothing in it": (
        "logging.every logging.validate_every logging.validation_draws logging.sample_every logging.sample_steps "
        "logging.sample_guidance logging.prompts logging.trackers logging.project logging.progress logging.peak_tflops"
    ),
    "when to save changes nothing in what is saved": (
        "checkpoint.every checkpoint.minutes checkpoint.keep checkpoint.background"
    ),
    "asked for at every start": "checkpoint.resume checkpoint.changed checkpoint.fallback",
    "a place may move; what lies there is compared by content": (
        "output data.train data.documents checkpoint.init_from tokenizer.image tokenizer.text data.allow_missing"
    ),
    "compared with the data, which are compared by content": (
        "data.image_size data.text_length data.vocabulary data.grid"
    ),
    "rows for watching; scores say which number of which rows they are, and others are not compared with them": (
        "data.validation data.validation_rows checkpoint.best"
    ),
    "of the export, which is made anew from the checkpoint": "checkpoint.export_dtype",
    "a run may be made longer or shorter; the learning rate before and after is said": "steps",
    "decides when a run gives up, not what it learns": "max_bad_steps",
}
FREE = {name: reason for reason, names in _REASONS.items() for name in names.split()}
"""Settings that may differ from the checkpoint's, each with the reason."""
FIXED = tuple(name for name, _, _ in leaves(TrainConfig()) if name not in FREE)
"""All others: they decide what is learnt. `checkpoint.changed=allow` goes on with another value."""

_PLACES = ("data.train", "data.documents", "checkpoint.init_from")
"""Compared by name with checkpoints from before contents were noted."""


@dataclass(frozen=True)
class Position:
    """Where a run stands, as `state.json` says: see `unidiff.train.step.TrainState` and `RunCheckpoint`."""

    step: int
    samples: int
    ema_updates: int
    bad_steps: int
    skipped: int
    level: float = 0.0  # older checkpoints have none

    @classmethod
    def now(cls, state: TrainState, samples: int) -> Position:
        """Of a running training."""
        return cls(state.step, samples, state.ema.updates, state.bad_steps, state.skipped, state.level)

    @classmethod
    def of(cls, state: Mapping[str, Any], where: Path) -> Position:
        """Raises ValueError, naming the file, for values that are missing or of another type."""
        own = {entry.name: state[entry.name] for entry in fields(cls) if entry.name in state}
        found = from_data(cls, own, f"{str(where)!r} is damaged: it")
        if negative := [name for name, value in asdict(found).items() if value < 0]:
            raise ValueError(f"{str(where)!r} is damaged: {negative[0]} is negative")
        return found


def restore(state: TrainState, found: RunCheckpoint, place: Position, where: Path) -> None:
    """Put a checkpoint into a fresh training. Raises ValueError where it is of another model or optimiser."""
    with fitting(where, "output="):
        state.model.load_state_dict(found.model)
        state.ema.load(found.ema, place.ema_updates)
        state.optimisers.load_state(found.optimiser)
    state.step, state.level = place.step, place.level
    state.bad_steps, state.skipped = place.bad_steps, place.skipped


def compare(state: Mapping[str, Any], config: TrainConfig, facts: Mapping[str, Any], where: Path) -> list[str]:
    """What a run does differently from the one that made a checkpoint, one sentence each.

    Args:
        state: of the checkpoint.
        config, facts: of this run; see `facts_of`.
        where: the checkpoint's folder, for messages.

    Returns:
        Notes on what may change, and what `checkpoint.changed=allow` lets through.

    Raises:
        ValueError: something of `FIXED`, the data or the starting weights differ; the message names each with both values.
    """
    old, known = state.get("config"), state.get("facts")
    if not isinstance(old, dict) or not isinstance(known, dict | None) or not isinstance(old.get("model", {}), dict):
        raise ValueError(f"'{where / 'state.json'}' is damaged: its config, model or facts are no mapping")
    if isinstance(tasks := old.get("tasks"), dict):
        old = old | {"tasks": {FORMER_TASKS.get(name, name): value for name, value in tasks.items()}}
    defaults = flat(asdict(TrainConfig())) | {f"model.{name}": value for name, value in _model_defaults().items()}
    before, now = defaults | flat(old), defaults | flat(asdict(config))
    names = [*FIXED, *(_PLACES if known is None else ())]
    names += sorted(name for name in {*before, *now} if name.startswith("model."))
    changed = differences(before, now, names)
    changed += [] if known is None else differences(known, facts)
    notes = rate_notes(config.schedule, config.optimiser.lr, state["step"], before["steps"], config.steps)
    if notes and config.data.curriculum and state["step"] < config.steps:
        notes.append(f"steps was {before['steps']}, here {config.steps}: the phases of data.curriculum move with it")
    if not changed:
        return notes
    listed = "; ".join(changed[:8]) + (f"; and {len(changed) - 8} more" if len(changed) > 8 else "")
    if config.checkpoint.changed == "allow":
        return [f"going on from {where}, which was made with {listed}", *notes]
    raise ValueError(
        f"{where} was made with {listed}: set it back, choose another output=, or go on with the new value with "
        "checkpoint.changed=allow"
    )


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted name."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return found


def differences(old: Mapping[str, Any], new: Mapping[str, Any], names: Iterable[str] | None = None) -> list[str]:
    """`name = old value, here new value` for each of `names` (None: all) whose values are not the same plain data."""
    names = sorted({*old, *new}) if names is None else names
    pairs = [(name, *(json.loads(json.dumps(side.get(name))) for side in (old, new))) for name in names]
    return [f"{name} = {_short(a)}, here {_short(b)}" for name, a, b in pairs if a != b]


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def check_same(
    old: Mapping[str, Any], new: Mapping[str, Any], folder: Path, setting: str, names: Iterable[str] | None = None
) -> None:
    """Raise ValueError, with both values, where a run is not the one that wrote the checkpoints in its `folder`.

    Args:
        setting: what a person names another folder by. names: those that are compared; None for all.
    """
    if changed := differences(old, new, names):
        raise ValueError(
            f"the run in {str(folder)!r} has {changed[0]}; use the same to continue it, or another {setting}"
        )


@contextmanager
def fitting(where: Path, setting: str) -> Iterator[None]:
    """Around putting a checkpoint into a run: what does not fit is one sentence. `setting` as in `check_same`."""
    try:
        yield
    except (RuntimeError, ValueError, TypeError, LookupError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{where} is of another model or optimiser; choose another {setting} ({reason})") from error


def rate_notes(schedule: ScheduleConfig, rate: float, step: int, old: Any, steps: int) -> list[str]:
    """What another number of steps than the `old` one does to the learning rate, whose peak is `rate`."""
    if old == steps or type(old) is not int or old < 1:
        return []
    said = f"steps was {old}, here {steps}"
    if step >= steps:
        return [f"{said}; the checkpoint is at step {step} already, so nothing is left to do"]
    before, after = (learning_rate_factor(schedule, step, number) for number in (old, steps))
    change = f": the rate of the {schedule.name} schedule goes from {rate * before:.3g} to {rate * after:.3g}"
    return [said + (f"{change} at step {step}" if before != after else "")]


def facts_of(config: TrainConfig, source: TokenSource, documents: DocumentTokens | None) -> dict[str, Any]:
    """What data and starting weights are, so that others under the same name are noticed: plain data by name.

    Reads the starting weights once; tables are hashed whole, token shards are known by their manifest.

    Raises:
        OSError: the starting weights cannot be read.
    """
    facts = {f"data.train {key}": value for key, value in _about(source).items()}
    if documents is not None:
        facts |= {f"data.documents {key}": value for key, value in _about(documents).items()}
    if config.checkpoint.init_from:
        digest = hashlib.sha256()
        for path in sorted(Path(config.checkpoint.init_from).glob("*.safetensors")):
            with reading(path, "weights"), open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        facts["checkpoint.init_from content"] = digest.hexdigest()[:16]
    return facts


def scored_as(config: TrainConfig, validation: TokenSource | None) -> str:
    """A name for the number that `checkpoint.best` compares, with the rows and masks that it is of."""
    about = None if validation is None else [_about(validation), config.data.validation_rows]
    return f"{config.checkpoint.best} {_digest([about, config.logging.validation_draws])[:16]}"


def _about(source: TokenSource | DocumentTokens) -> dict[str, Any]:
    vocabulary = _digest(source.vocabulary.to_dict())[:8]
    about: dict[str, Any] = {"grid": list(source.grid), "vocabulary": f"{source.vocabulary.size} ids ({vocabulary})"}
    if isinstance(source, WeightedShards):
        about["rows"] = source.rows
        return {**about, "content": _digest(source.stamp())[:16]}
    about |= {"text length": source.text_length, "text prefix": source.text_prefix, "rows": source.rows}
    content = source.digest() if isinstance(source, TokenTable) else hashlib.sha256().hexdigest()
    return {**about, "content": content[:16]}


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@cache
def _model_defaults() -> dict[str, Any]:
    return {field.name: field.default for field in fields(TransformerConfig) if field.name != "vocab_size"}
