"""What a run may change when it goes on from a checkpoint, and what makes it another run."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from unidiff.errors import reading
from unidiff.models.transformer import MaskedTransformer
from unidiff.schema import from_data
from unidiff.train.config import TASKS, TaskConfig, TrainConfig
from unidiff.train.data.documents import DocumentTokens
from unidiff.train.data.shard_source import ShardTokens
from unidiff.train.data.source import TokenSource, TokenTable
from unidiff.train.optim import learning_rate_factor
from unidiff.train.run.checkpoint import Checkpoint
from unidiff.train.run.limits import leaves
from unidiff.train.step import TrainState

_ROUNDING = "the same numbers but for rounding"
_WATCHING = "says what happens, and changes nothing in it"
_PLACE = "a place may move; what lies there is compared by content"
_DECLARED = "compared with the data, which are compared by content"

FREE: dict[str, str] = {
    "output": "a run's folder may be moved",
    "steps": "a run may be made longer or shorter; the learning rate before and after is said",
    "device": _ROUNDING,
    "threads": _ROUNDING,
    "compile": _ROUNDING,
    "attention_kernel": _ROUNDING,
    "activation_checkpointing": "what is computed again comes out the same",
    "objective.chunk": _ROUNDING,
    "max_bad_steps": "decides when a run gives up, not what it learns",
    "data.train": _PLACE,
    "data.validation": "rows for watching; scores of other rows are not compared, and training rows are compared by content",
    "data.validation_rows": "as data.validation",
    "data.documents": _PLACE,
    "data.allow_missing": "what was encoded is compared by content",
    "data.image_size": _DECLARED,
    "data.text_length": _DECLARED,
    "data.vocabulary": _DECLARED,
    "data.grid": _DECLARED,
    "tokenizer.image": "draws sample sheets; what it made of raw shards is compared by content",
    "tokenizer.text": "as tokenizer.image",
    "logging.every": _WATCHING,
    "logging.validate_every": _WATCHING,
    "logging.validation_draws": _WATCHING,
    "logging.sample_every": _WATCHING,
    "logging.sample_steps": _WATCHING,
    "logging.sample_guidance": _WATCHING,
    "logging.prompts": _WATCHING,
    "logging.trackers": _WATCHING,
    "logging.project": _WATCHING,
    "logging.progress": _WATCHING,
    "logging.peak_tflops": _WATCHING,
    "checkpoint.every": "when to save changes nothing in what is saved",
    "checkpoint.minutes": "as checkpoint.every",
    "checkpoint.keep": "as checkpoint.every",
    "checkpoint.best": "scores say which number they are; another one is not compared with them",
    "checkpoint.background": "as checkpoint.every",
    "checkpoint.resume": "asked for at every start",
    "checkpoint.changed": "asked for at every start",
    "checkpoint.fallback": "asked for at every start",
    "checkpoint.init_from": _PLACE,
    "checkpoint.export_dtype": "of the export, which is made anew from the checkpoint",
    "parallel.mode": _ROUNDING,
    "parallel.replicas": _ROUNDING,
    "parallel.reshard": _ROUNDING,
}
"""Settings that may differ from the checkpoint's, each with the reason."""

FIXED: dict[str, str] = {
    "seed": "draws the order of the data, the masks and the first weights",
    "batch_size": "decides which samples make a step",
    "accumulate": "decides which samples make a step",
    "precision": "the precision of all products",
    "spike_factor": "decides which steps are skipped",
    "data.curriculum": "decides which sample comes when",
    "data.crop_fill": "changes the rows",
    "data.document_share": "decides which sample comes when",
    "data.pack": "changes the rows",
    "model": "another network",
    "objective.text_weight": "another loss",
    "objective.image_weight": "another loss",
    "lora.rank": "other adapters",
    "lora.alpha": "scales what the adapters have learnt",
    "lora.dropout": "another loss",
    "lora.dora": "other adapters",
    "lora.targets": "other adapters",
    "optimiser.name": "another state",
    "optimiser.lr": "another step",
    "optimiser.muon_lr": "another step",
    "optimiser.beta1": "another step",
    "optimiser.beta2": "another step",
    "optimiser.eps": "another step",
    "optimiser.weight_decay": "another step",
    "optimiser.momentum": "another step",
    "optimiser.clip": "another step",
    "optimiser.state_bits": "another state",
    "schedule.name": "another step",
    "schedule.warmup": "another step",
    "schedule.decay": "another step",
    "schedule.floor": "another step",
    "ema.decay": "another average",
    "ema.warmup": "another average",
    "parallel.param_dtype": "the precision in which weights are gathered",
    "parallel.reduce_dtype": "the precision in which gradients are summed",
    **{f"tasks.{task}.{entry.name}": "another mixture or loss" for task in TASKS for entry in fields(TaskConfig)},
}
"""Settings that decide what is learnt, each with the reason: `checkpoint.changed=allow` goes on with another value."""

_PLACES = ("data.train", "data.documents", "checkpoint.init_from")
"""Compared by name with checkpoints from before contents were noted."""


@dataclass(frozen=True)
class Position:
    """Where a run stands, as `state.json` says: see `unidiff.train.step.TrainState` and `Checkpoint`."""

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


def restore(state: TrainState, found: Checkpoint, place: Position, where: Path) -> None:
    """Put a checkpoint into a fresh training. Raises ValueError where it is of another model or optimiser."""
    try:
        state.model.load_state_dict(found.model)
        state.ema.load(found.ema, place.ema_updates)
        state.optimisers.load_state(found.optimiser)
    except (RuntimeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{where} is of another model or optimiser; choose another output= ({reason})") from error
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
    old, new, known = state.get("config"), asdict(config), state.get("facts")
    if not isinstance(old, dict) or not isinstance(known, dict | None) or not isinstance(old.get("model", {}), dict):
        raise ValueError(f"'{where / 'state.json'}' is damaged: its config, model or facts are no mapping")
    before = asdict(TrainConfig())  # for settings that there were not yet
    names = [name for name, _, _ in leaves(config) if name in FIXED or (known is None and name in _PLACES)]
    pairs = {
        name: (_look_up(old, name, _look_up(before, name)), _look_up(new, name)) for name in names if name != "model"
    }
    models = [{**_model_defaults(), **settings.get("model", {})} for settings in (old, new)]
    pairs |= {f"model.{name}": (models[0].get(name), models[1].get(name)) for name in sorted({*models[0], *models[1]})}
    if known is not None:
        pairs |= {name: (known.get(name), facts.get(name)) for name in sorted({*known, *facts})}
    plain = {name: tuple(json.loads(json.dumps(value)) for value in pair) for name, pair in pairs.items()}
    changed = [f"{name} = {_short(a)}, here {_short(b)}" for name, (a, b) in plain.items() if a != b]
    notes = _schedule_notes(state, config)
    if not changed:
        return notes
    listed = "; ".join(changed[:8]) + (f"; and {len(changed) - 8} more" if len(changed) > 8 else "")
    if config.checkpoint.changed == "allow":
        return [f"going on from {where}, which was made with {listed}", *notes]
    raise ValueError(
        f"{where} was made with {listed}: set it back, choose another output=, or go on with the new value with "
        "checkpoint.changed=allow"
    )


def _schedule_notes(state: Mapping[str, Any], config: TrainConfig) -> list[str]:
    """What another number of steps does to the learning rate."""
    old, step = _look_up(state["config"], "steps"), state["step"]
    if old == config.steps or isinstance(old, bool) or not isinstance(old, int) or old < 1:
        return []
    if step >= config.steps:
        return [
            f"steps was {old}, here {config.steps}; the checkpoint is at step {step} already, so nothing is left to do"
        ]
    before, after = (learning_rate_factor(config.schedule, step, steps) for steps in (old, config.steps))
    notes = [f"steps was {old}, here {config.steps}"]
    if before != after:
        rates = f"{config.optimiser.lr * before:.3g} to {config.optimiser.lr * after:.3g}"
        notes = [f"{notes[0]}: the rate of the {config.schedule.name} schedule goes from {rates} at step {step}"]
    if config.data.curriculum:
        notes.append(f"steps was {old}, here {config.steps}: the phases of data.curriculum move with it")
    return notes


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
    rows = json.dumps([about, config.logging.validation_draws], sort_keys=True)
    return f"{config.checkpoint.best} {hashlib.sha256(rows.encode()).hexdigest()[:16]}"


def _about(source: TokenSource | DocumentTokens) -> dict[str, Any]:
    about: dict[str, Any] = {"grid": list(source.grid), "vocabulary": _vocabulary(source)}
    digest = hashlib.sha256()
    if isinstance(source, DocumentTokens | ShardTokens):
        about["rows"] = len(source) if isinstance(source, DocumentTokens) else source.rows
        digest.update(json.dumps(source.stamp(), sort_keys=True).encode())
    else:
        about |= {"text length": source.text_length, "text prefix": source.text_prefix, "rows": source.rows}
        if isinstance(source, TokenTable):
            return {**about, "content": source.digest()[:16]}
    return {**about, "content": digest.hexdigest()[:16]}


def _vocabulary(source: TokenSource | DocumentTokens) -> str:
    content = json.dumps(source.vocabulary.to_dict(), sort_keys=True)
    return f"{source.vocabulary.size} ids ({hashlib.sha256(content.encode()).hexdigest()[:8]})"


@cache
def _model_defaults() -> dict[str, Any]:
    parameters = inspect.signature(MaskedTransformer.__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.name not in ("self", "vocab_size")}


def _look_up(settings: Any, name: str, default: Any = None) -> Any:
    for key in name.split("."):
        if not isinstance(settings, dict) or key not in settings:
            return default
        settings = settings[key]
    return settings


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
