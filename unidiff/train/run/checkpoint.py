"""Checkpoints without pickle: safetensors and JSON in a folder that appears by one rename; a `latest` pointer after it.

<run>/checkpoints/step-00001000/{model,ema,optimiser}.safetensors  state.json  SHA256SUMS   written by one process
<run>/checkpoints/step-00001000/shards/*.safetensors               state.json  SHA256SUMS   by several, each its shards
<run>/checkpoints/latest, best  names of the newest complete folder, and of the one with the best validation

Either kind can be continued by any number of processes. `sha256sum -c SHA256SUMS` in a checkpoint's folder checks it, too.
Shards are `torch.distributed.checkpoint`'s safetensors: tensors are named `model.X`, `ema.X`, `optimiser.X`, and the place
of every piece is in the file's header.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor

from unidiff.errors import DamagedFile, explain, read_json, reading
from unidiff.files import flush_to_disk, remove_leftovers, replace_text, replacing_folder
from unidiff.train.run.distributed import Parallel, placed_like

_LOG = logging.getLogger(__name__)
PARTS = ("model", "ema", "optimiser")
SHARDS, STATE, SUMS = "shards", "state.json", "SHA256SUMS"
KINDS = {"config": "a model's training", "settings": "an image tokenizer's training", "about": "reward tuning"}
"""Kinds of runs, by the key that each has its settings under in `state.json`."""
Template = Callable[[str, str], Tensor | None]
"""(part, name) to a tensor of this run, or None. Where it is sharded, and of the saved shape, the loaded one is sharded alike."""
_STEP = re.compile(r"step-(\d{8,})")
_LINE = re.compile(r"([0-9a-f]{64})  ([^\n]+)\n")


@dataclass(frozen=True)
class RunCheckpoint:
    """Everything a run continues from.

    `state` is plain data: where the run stands, its config, `facts` about the data and the starting weights; where a
    validation happened at this very step `score`, the number that `best` compares, and `scored`, which number on which rows.
    """

    model: dict[str, Tensor]
    ema: dict[str, Tensor]
    optimiser: dict[str, Tensor]
    state: dict[str, Any]


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def step_names(folder: Path) -> list[str]:
    """Names of the checkpoints in `folder`, the oldest first. Anything else that lies there is not ours."""
    found = [p.name for p in folder.iterdir() if _STEP.fullmatch(p.name)] if folder.is_dir() else []
    return sorted(found, key=lambda name: int(name.removeprefix("step-")))


def holds_checkpoints(folder: Path) -> bool:
    """Whether a run has begun here."""
    return bool(step_names(folder)) or (folder / "latest").exists()


def save_checkpoint(folder: Path, checkpoint: RunCheckpoint, keep: int) -> None:
    """Write `folder/step-N`, point `latest` at it, and delete all but the `keep` newest and the best.

    A process killed anywhere in here leaves the previous checkpoint in charge. Raises OSError for a full or read-only disk
    and the like; nothing half-written stays.
    """
    name = step_name(checkpoint.state["step"])
    if pointed_name(folder) == name:  # SIGTERM right after a regular save: it is on disk already
        return
    with replacing_folder(folder / name) as temporary:
        for part in PARTS:
            tensors = {k: v.detach().cpu().contiguous() for k, v in getattr(checkpoint, part).items()}
            save_file(tensors, temporary / f"{part}.safetensors")
        write_state(temporary, checkpoint.state)
        write_sums(temporary)
    publish(folder, name, keep)


class _Writer(dcp.HuggingFaceStorageWriter):
    """Ends, on one process and when all have written, with the checksums of the whole checkpoint."""

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        super().finish(metadata, results)
        write_sums(Path(self.path).parent)


class CheckpointSaver:
    """Writes the checkpoints of a run into `folder`, which all of its processes must see.

    A checkpoint counts, and the pointer moves, when every process has written its part.

    Args:
        keep: newest checkpoints kept, besides the best.
        background: in a process group, `save` returns when the state is copied, and a thread writes.
    """

    def __init__(self, folder: Path, keep: int, background: bool, parallel: Parallel) -> None:
        self.folder, self.keep, self.background, self.parallel = folder, keep, background, parallel
        self._pending: tuple[Future[Any], str, ExitStack] | None = None

    def save(self, checkpoint: RunCheckpoint) -> None:
        """Start writing; all processes must call this with their part of the same step. Raises OSError or ValueError for a
        full or read-only disk and the like, of this checkpoint or the one before it."""
        if not self.parallel.grouped:
            save_checkpoint(self.folder, checkpoint, self.keep)
            return
        self.wait()
        name, place, folder = step_name(checkpoint.state["step"]), ExitStack(), ""
        if self.parallel.main and pointed_name(self.folder) != name:
            temporary = place.enter_context(replacing_folder(self.folder / name))
            (temporary / SHARDS).mkdir()
            write_state(temporary, checkpoint.state)
            folder = str(temporary)
        if not (folder := self.parallel.collect(folder)[0]):  # it is on the disk already
            return
        tensors = {f"{part}.{k}": v.detach() for part in PARTS for k, v in getattr(checkpoint, part).items()}
        writer = _Writer(str(Path(folder) / SHARDS), save_distributed=True)
        pending = dcp.async_save(tensors, storage_writer=writer, process_group=self.parallel.saving)
        assert isinstance(pending, Future)
        self._pending = pending, name, place
        if not self.background:
            self.wait()

    def poll(self) -> None:
        """Publish what is complete; to be called now and then."""
        if self._pending is not None and self._pending[0].done():
            self.wait()

    def wait(self) -> None:
        """Until the checkpoint in the making, if any, is complete. Raises what its writing raised."""
        if self._pending is None:
            return
        (pending, name, place), self._pending = self._pending, None
        with place:
            try:
                pending.result()  # on rank 0 this means that all ranks have written: the writing ends with a message to it
            except CheckpointException as error:  # of whichever process
                raise next(iter(error.failures.values()))[0] from error
        if self.parallel.main:
            publish(self.folder, name, self.keep)


def write_state(folder: Path, state: dict[str, Any]) -> None:
    """`state.json`, which says that checksums belong to it."""
    (folder / STATE).write_text(json.dumps({**state, "sums": SUMS}, indent=1), encoding="utf-8")


def write_sums(folder: Path) -> None:
    """Write `SHA256SUMS` about every file below `folder`, and wait until all is on the disk."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    lines = [f"{_digest(path)}  {path.relative_to(folder).as_posix()}\n" for path in files]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")
    for path in (*files, folder / SUMS, *{p.parent for p in files}):
        flush_to_disk(path)


def damage(target: Path, share: tuple[int, int] = (0, 1)) -> str:
    """What is wrong with a checkpoint folder, as the first part of a sentence; empty when it is whole. With a `share`
    (n, of) only every `of`-th file is hashed, from the n-th on, where others look at the rest."""
    if not target.is_dir():
        return f"checkpoint {target} is not there"
    try:
        step = read_state(target).get("step")
        if type(step) is int and step >= 0 and step_name(step) != target.name:
            return f"checkpoint {target} is of step {step}, as its {STATE} says: it was renamed or copied"
        if not (target / SUMS).is_file():
            return f"checkpoint {target} lacks {SUMS}"
        text = (target / SUMS).read_bytes().decode("utf-8", "replace")
        listed = {name: digest for digest, name in _LINE.findall(text)}
        if text != "".join(f"{digest}  {name}\n" for name, digest in listed.items()) or not listed:
            return f"checkpoint {target} is damaged: {SUMS} is no list of checksums"
        found = {p.relative_to(target).as_posix() for p in target.rglob("*") if p.is_file()}
        needed = set() if (target / SHARDS).is_dir() else {f"{part}.safetensors" for part in PARTS}
        if missing := sorted(({*listed, STATE} | needed) - found):
            return f"checkpoint {target} lacks {', '.join(missing)}"
        if strays := sorted(name for name in found - set(listed) if name.endswith(".safetensors") or name == STATE):
            return f"checkpoint {target} is damaged: {strays[0]} is not in {SUMS}"
        for name in sorted(listed)[share[0] :: share[1]]:
            if _digest(target / name) != listed[name]:
                return f"checkpoint {target} is damaged: {name} does not have its checksum in {SUMS}"
    except FileNotFoundError:
        return f"checkpoint {target} lacks {STATE}"
    except (OSError, ValueError) as error:
        return f"checkpoint {target} is damaged: {explain(error)}"
    return ""


class CheckpointChoice(NamedTuple):
    """The checkpoint that a run goes on from, and what a person should know about how it was chosen."""

    name: str
    notes: list[str]


def choose(
    folder: Path, fallback: bool, setting: str = "checkpoint.fallback=true", parallel: Parallel | None = None
) -> CheckpointChoice | None:
    """The checkpoint that `latest` names; without that file the newest one; None when there is none at all.

    Args:
        fallback: take the newest whole one where that one is damaged. setting: what a person types for it.
        parallel: processes that each look at their share of the files; all must call this and get the same.

    Raises:
        DamagedFile: it is damaged; the message names the newest whole one besides it, and how to go on from there.
    """

    def damaged(target: Path) -> str:
        share = (parallel.rank, parallel.size) if parallel else (0, 1)
        found = damage(target, share)
        return next(filter(None, parallel.collect(found)), "") if parallel else found

    names, notes, wrong, name = step_names(folder), [], "", None
    try:
        name = pointed_name(folder)
    except (OSError, ValueError) as error:
        wrong = explain(error) or str(error)
    if name is None and not wrong:
        if not names:
            return None
        name = names[-1]
        notes.append(f"{folder / 'latest'} is missing; {name} is the newest checkpoint there")
    wrong = wrong or damaged(folder / str(name))
    if not wrong:
        if names and name != names[-1]:
            notes.append(f"{folder / 'latest'} names {name}; {names[-1]}, which lies there too, is not used")
        return CheckpointChoice(str(name), notes)
    whole = next((other for other in reversed(names) if other != name and not damaged(folder / other)), None)
    if whole is None:
        raise DamagedFile(f"{wrong}; no other checkpoint there is whole: choose another output=, or bring back a copy")
    if not fallback:
        raise DamagedFile(f"{wrong}; {whole} is whole: go on from there with {setting}")
    return CheckpointChoice(whole, [*notes, f"{wrong}; going on from {whole}"])


def settle(folder: Path, choice: CheckpointChoice) -> None:
    """Let `latest` name the chosen checkpoint, and say how it was chosen where that is not plain."""
    for note in choice.notes:
        _LOG.warning("%s", note)
    if not (folder / "latest").is_file() or (folder / "latest").read_bytes() != f"{choice.name}\n".encode():
        replace_text(folder / "latest", choice.name + "\n")


def publish(folder: Path, name: str, keep: int) -> None:
    """Let the complete folder `name` be the newest: pointers, then the deletion of what is no longer kept."""
    flush_to_disk(folder)
    score, scored = _score(folder, name)
    if score < score_of(folder, scored):
        replace_text(folder / "best", name + "\n")
    replace_text(folder / "latest", name + "\n")
    for stray in folder.glob(".step-*.*"):  # of processes that were killed
        remove_leftovers(folder / stray.name.split(".")[1])
    kept = {name, pointed_name(folder, "best"), *step_names(folder)[-keep:]}
    for old in step_names(folder):
        if old not in kept:
            shutil.rmtree(folder / old, ignore_errors=True)


def pointed_name(folder: Path, pointer: str = "latest") -> str | None:
    """The folder name that the file `pointer` (`latest` or `best`) holds, or None without that file. Raises DamagedFile
    where it holds something else."""
    path = folder / pointer
    if not path.exists():
        return None
    found = "newest checkpoint is found" if pointer == "latest" else "best one is looked for anew"
    with reading(path, "the name of a checkpoint", f"delete it: the {found} without it"):
        name = path.read_text(encoding="utf-8").removesuffix("\n")
        if not _STEP.fullmatch(name):
            raise ValueError(f"it holds {name[:80]!r}")
    return name


def score_of(folder: Path, scored: str | None) -> float:
    """The validation number of the best checkpoint; infinity where there is none, or it is not `scored` on the same rows
    and cannot be compared."""
    score, own = _score(folder, pointed_name(folder, "best"))
    return score if None in (scored, own) or own == scored else math.inf


def _score(folder: Path, name: str | None) -> tuple[float, str | None]:
    path = folder / (name or "") / STATE
    if not name or not path.is_file():
        return math.inf, None
    state = read_state(path.parent)
    score, scored = state.get("score", math.inf), state.get("scored")
    if isinstance(score, bool) or not isinstance(score, int | float) or not isinstance(scored, str | None):
        raise DamagedFile(f"{str(path)!r} is damaged: score is {score!r}; delete {str(folder / 'best')!r} to go on")
    return score, scored


def load_checkpoint(folder: Path, kind: str, fallback: bool, setting: str) -> RunCheckpoint | None:
    """The checkpoint that `choose` finds, or None when there is none. Raises DamagedFile for a damaged one, ValueError for
    one of a run of another kind than `kind` (of `KINDS`)."""
    choice = choose(folder, fallback, setting=setting)
    if choice is None:
        return None
    settle(folder, choice)
    check_kind(read_state(folder / choice.name), kind, folder)
    return read_checkpoint(folder / choice.name)


def read_checkpoint(
    target: Path, template: Template = lambda part, name: None, parallel: Parallel | None = None
) -> RunCheckpoint:
    """The checkpoint in `target`, placed as this run needs it. Raises DamagedFile where it cannot be read."""
    parts: dict[str, dict[str, Tensor]] = {part: {} for part in PARTS}
    if (target / SHARDS).is_dir():
        with reading(target / SHARDS, "a sharded checkpoint"):
            tensors = _read_shards(target / SHARDS, template, parallel)
        for key, value in tensors.items():
            part, name = key.split(".", 1)
            parts[part][name] = value
    else:
        for part in PARTS:
            path = target / f"{part}.safetensors"
            with reading(path, "a part of a checkpoint"):
                whole = load_file(path)
            parts[part] = {name: placed_like(value, template(part, name)) for name, value in whole.items()}
    return RunCheckpoint(**parts, state=read_state(target))


def _read_shards(folder: Path, template: Template, parallel: Parallel | None) -> dict[str, Tensor]:
    reader = dcp.HuggingFaceStorageReader(str(folder))
    tensors: dict[str, Tensor] = {}
    for key, meta in reader.read_metadata().state_dict_metadata.items():
        assert isinstance(meta, TensorStorageMetadata)  # the safetensors format holds nothing else
        like, dtype = template(*key.split(".", 1)), meta.properties.dtype
        if isinstance(like, DTensor) and like.shape == meta.size:
            tensors[key] = torch.zeros_like(like.detach(), dtype=dtype)
        else:
            tensors[key] = torch.empty(meta.size, dtype=dtype)
    group = parallel.saving if parallel else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns that one process is one process
        dcp.load(tensors, storage_reader=reader, process_group=group, no_dist=group is None)
    return tensors


def read_state(target: Path) -> dict[str, Any]:
    """`state.json` of a checkpoint. Raises DamagedFile, or FileNotFoundError when it is not there."""
    return read_json(target / STATE, "the state of a checkpoint")


def check_kind(state: Mapping[str, Any], kind: str, folder: Path) -> None:
    """Raise ValueError for the state of a run of another kind."""
    for key, name in KINDS.items():
        if key != kind and key in state and kind not in state:
            raise ValueError(f"{str(folder)!r} holds checkpoints of {name}; name another output folder")


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
