"""What a run's folder may hold when it begins, and what the run may change when it goes on from a checkpoint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Annotated, Any

from torch import Tensor

from unidiff.config import flat
from unidiff.errors import reading
from unidiff.models.config import TransformerConfig
from unidiff.models.trained_on import FORMER_TASKS
from unidiff.pipelines.owned import check_replaceable, others_in_adapter, others_in_model
from unidiff.schema import Between, check_value, differences, listed
from unidiff.train.config import ScheduleConfig, TrainConfig, leaves
from unidiff.train.data.shard_source import DocumentTokens, WeightedShards
from unidiff.train.data.source import TokenSource, TokenTable
from unidiff.train.optim import learning_rate_factor
from unidiff.train.run.checkpoint import (
    STATE,
    CheckpointChoice,
    check_kind,
    choose,
    holds_checkpoints,
    read_checkpoint,
    read_state,
)
from unidiff.train.step import TrainState

_REASONS = {
    "the same numbers but for rounding": (
        "device threads compile attention_kernel objective.chunk parallel.mode parallel.replicas parallel.reshard"
    ),
    "what is computed again comes out the same": "activation_checkpointing",
    "says what happens, and changes nothing in it": (
        "logging.every logging.validate_every logging.validation_draws logging.sample_every logging.sample_steps "
        "logging.sample_guidance logging.prompts logging.sweep_rows logging.trackers logging.project logging.progress logging.report "
        "logging.peak_tflops"
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


_COUNTS = dict.fromkeys(("step", "samples", "bad_steps", "skipped"), Annotated[int, Between(0)])
_POSITION = {**_COUNTS, "level": Annotated[float, Between(0)]}


def position(state: TrainState) -> dict[str, Any]:
    """Where a run stands, as `state.json` says: attributes of `state`, and the updates of its moving averages."""
    return {
        "ema_updates": state.ema.updates,
        "level": float(state.level),
        **{name: getattr(state, name) for name in _COUNTS},
    }


def resume(state: TrainState, folder: Path, config: TrainConfig, facts: Mapping[str, Any]) -> CheckpointChoice | None:
    """Put the checkpoint to go on from in `folder`, if there is one, into a fresh training; all processes must call this.
    Raises ValueError where it is damaged, of another run (see `compare`), model or optimiser, or not asked for."""
    settings, parallel = config.checkpoint, state.parallel
    if not settings.resume:
        if holds_checkpoints(folder):
            raise ValueError(
                f"{folder} already holds a run; choose another output=, or checkpoint.resume=true to continue it"
            )
        return None
    choice = choose(folder, settings.fallback, parallel=parallel)
    if choice is None:
        return None

    def template(part: str, name: str) -> Tensor | None:
        return state.optimisers.owner(name) if part == "optimiser" else state.ema.average.get(name)

    where = folder / choice.name
    plain = read_state(where)
    check_kind(plain, "config", folder)
    for name, kind in {**_POSITION, "ema_updates": _COUNTS["step"]}.items():
        check_value(plain.get(name), kind, f"{str(where / STATE)!r} is damaged: its {name}")
    notes = compare(plain, config, facts, where)
    found = read_checkpoint(where, template, parallel)
    with fitting(where, "output="):
        state.model.load_state_dict(found.model)
        state.ema.load(found.ema, plain["ema_updates"])
        state.optimisers.load_state(found.optimiser)
    for name in _COUNTS:
        setattr(state, name, plain[name])
    state.level.fill_(plain["level"])
    if parallel.agree(not state.finite())[0]:
        raise ValueError(f"{where} holds weights that are not finite; delete it to go on from the one before")
    return choice._replace(notes=[*choice.notes, *notes])


def compare(state: Mapping[str, Any], config: TrainConfig, facts: Mapping[str, Any], where: Path) -> list[str]:
    """What a run does differently from the one that made a checkpoint, one sentence each: notes on what may change, and
    what `checkpoint.changed=allow` lets through.

    Args:
        state: of the checkpoint in the folder `where`. config, facts: of this run; see `facts_of`.

    Raises:
        ValueError: something of `FIXED`, the data or the starting weights differ; the message names each with both values.
    """
    old, known = state.get("config"), state.get("facts")
    if not isinstance(old, dict) or not isinstance(known, dict) or not isinstance(old.get("model", {}), dict):
        raise ValueError(f"'{where / 'state.json'}' is damaged: its config, model or facts are no mapping")
    if isinstance(tasks := old.get("tasks"), dict):
        old = old | {"tasks": {FORMER_TASKS.get(name, name): value for name, value in tasks.items()}}
    model = {field.name: field.default for field in fields(TransformerConfig) if field.name != "vocab_size"}
    defaults = flat(asdict(TrainConfig()) | {"model": model})
    before, now = defaults | flat(old), defaults | flat(asdict(config))
    names = [*FIXED, *sorted(name for name in {*before, *now} if name.startswith("model."))]
    changed = differences(before, now, names) + differences(known, facts)
    notes = rate_notes(config.schedule, config.optimiser.lr, state["step"], before["steps"], config.steps)
    if notes and config.data.curriculum and state["step"] < config.steps:
        notes.append(f"steps was {before['steps']}, here {config.steps}: the phases of data.curriculum move with it")
    if not changed:
        return notes
    if config.checkpoint.changed == "allow":
        return [f"going on from {where}, which was made with {listed(changed)}", *notes]
    raise ValueError(
        f"{where} was made with {listed(changed)}: set it back, choose another output=, or go on with the new value with "
        "checkpoint.changed=allow"
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


def scored_as(config: TrainConfig, best: str, validation: TokenSource | None) -> str:
    """A name for the number `best` that is compared, with the rows and masks that it is of."""
    about = None if validation is None else [_about(validation), config.data.validation_rows]
    return f"{best} {_digest([about, config.logging.validation_draws])[:16]}"


def _about(source: TokenSource | DocumentTokens) -> dict[str, Any]:
    vocabulary = f"{source.vocabulary.size} ids ({_digest(source.vocabulary.to_dict())[:8]})"
    about = {"grid": list(source.grid), "vocabulary": vocabulary, "rows": source.rows}
    if isinstance(source, WeightedShards):
        return {**about, "content": _digest(source.stamp())[:16]}
    content = source.digest() if isinstance(source, TokenTable) else hashlib.sha256().hexdigest()
    return {**about, "text length": source.text_length, "text prefix": source.text_prefix, "content": content[:16]}


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


MARK = "# Settings of the last start of this run, written by unidiff.\n"
SETTINGS = "config.yaml"
WRITTEN = (SETTINGS, "model", "model-best", "adapter", "adapter-best")
"""What a model's training replaces in its folder."""


def check_run_folder(out: Path, setting: str, started_from: str | None, written: Iterable[str] = WRITTEN) -> None:
    """Raise ValueError, naming it, for an output folder in which a run would spoil something else.

    That is a pipeline or the starting weights, a `config.yaml` of a person's own, exports with other files among them, or
    the model of a run whose checkpoints are gone.

    Args:
        setting: what a person types for `out`. started_from: folder of the starting weights, if any.
        written: names that the run replaces in `out`, folders (of models) without an ending.
    """
    _check_place(out, setting, started_from)
    checkpoints = out / "checkpoints"
    for path in (out / name for name in written):
        if path.name == SETTINGS:
            ours = checkpoints.is_dir() or (out / "metrics.jsonl").is_file() or not path.exists()
            if not ours and not (path.is_file() and path.read_bytes().startswith(MARK.encode())):
                raise ValueError(f"'{path}' is of no run and would be replaced; name another {setting}=, or move it")
            continue
        if path.name.startswith("adapter"):
            check_replaceable(path, others_in_adapter, "LoRA adapter")
        elif not path.suffix:
            check_replaceable(path, others_in_model, "model")
        lost = path.exists() and not (path.is_dir() and not any(path.iterdir()))
        if lost and not holds_checkpoints(checkpoints):
            kind = path.name if path.suffix else f"a {path.name}"
            raise ValueError(
                f"{str(out)!r} holds {kind} and no checkpoint to go on from; name another {setting}= (the {path.name} would "
                "be replaced)"
            )


def _check_place(out: Path, setting: str, started_from: str | None) -> None:
    """Raise ValueError for the output of a run that is a file, in a pipeline, or among its own starting weights."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{setting}={str(out)!r} is a file or a device; name a folder")
    checkpoints, place = out / "checkpoints", out.resolve()
    if checkpoints.exists() and not checkpoints.is_dir():
        raise ValueError(f"{str(checkpoints)!r} is a file where the run puts its checkpoints; move it")
    for folder in (place, *place.parents):
        if (folder / "model_index.json").exists():
            raise ValueError(f"{setting}={str(out)!r} is in the pipeline folder {str(folder)!r}; name another folder")
    start = Path(started_from).resolve() if started_from else None
    if start in (place, *place.parents):
        raise ValueError(f"{setting}={str(out)!r} is in the folder of the starting weights; name another folder")
    for name in ("model", "model-best", "pipeline"):
        if start and (place / name).resolve() in (start, *start.parents):
            raise ValueError(
                f"the starting weights, {started_from!r}, would be replaced by this run's own {name}; name another {setting}="
            )
