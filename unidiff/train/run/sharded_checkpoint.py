"""Checkpoints of several processes, through `torch.distributed.checkpoint`: each writes its shards, in the background.

The storage is DCP's safetensors format (no pickle): `step-N/shards/shard-*.safetensors`, with the place of every piece in
the file's header, so that any number of processes can read them. Tensors are named `model.X`, `ema.X`, `optimiser.X`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor

from unidiff.errors import reading
from unidiff.files import replacing_folder
from unidiff.train.run.checkpoint import (
    PARTS,
    SHARDS,
    CheckpointChoice,
    RunCheckpoint,
    choose,
    damage,
    pointed_name,
    publish,
    read_checkpoint,
    read_state,
    save_checkpoint,
    step_name,
    write_state,
    write_sums,
)
from unidiff.train.run.distributed import Parallel, placed_like

Template = Callable[[str, str], Tensor | None]  # (part, name) -> a tensor placed as the loaded one shall be


class _Writer(dcp.HuggingFaceStorageWriter):
    """Ends, on one process and when all have written, with the checksums of the whole checkpoint."""

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        super().finish(metadata, results)
        write_sums(Path(self.path).parent)


class CheckpointSaver:
    """Writes the checkpoints of a run into `folder`, which all of its processes must see.

    With a process group `save` returns when the state is copied; writing goes on in a thread. A checkpoint counts, and the
    pointer moves, when every process has written its part.

    Args:
        folder: `<run>/checkpoints`.
        keep: newest checkpoints kept, besides the best.
        background: whether `save` returns before all is on the disk, in a process group.
    """

    def __init__(self, folder: Path, keep: int, background: bool, parallel: Parallel) -> None:
        self.folder, self.keep, self.background, self.parallel = folder, keep, background, parallel
        self._pending: tuple[Future[Any], str, ExitStack] | None = None

    def save(self, checkpoint: RunCheckpoint) -> None:
        """Start writing; all processes must call this with their part of the same step.

        Raises:
            OSError, ValueError: a full or read-only disk and the like, for this checkpoint or the one before it.
        """
        if not self.parallel.grouped:
            save_checkpoint(self.folder, checkpoint, self.keep)
            return
        self.wait()
        name, place = step_name(checkpoint.state["step"]), ExitStack()
        temporary = self.parallel.collect(self._prepare(name, place, checkpoint.state))[0]
        if not temporary:
            return
        tensors = {f"{part}.{k}": v.detach() for part in PARTS for k, v in getattr(checkpoint, part).items()}
        writer = _Writer(str(Path(temporary) / SHARDS), save_distributed=True)
        pending = dcp.async_save(tensors, storage_writer=writer, process_group=self.parallel.saving)
        assert isinstance(pending, Future)
        self._pending = pending, name, place
        if not self.background:
            self.wait()

    def _prepare(self, name: str, place: ExitStack, state: dict[str, Any]) -> str:
        """The main process's folder for a new checkpoint; empty when it is on the disk already."""
        if not self.parallel.main or pointed_name(self.folder) == name:
            return ""
        temporary = place.enter_context(replacing_folder(self.folder / name))
        (temporary / SHARDS).mkdir()
        write_state(temporary, state)
        return str(temporary)

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


def choose_together(folder: Path, fallback: bool, parallel: Parallel) -> CheckpointChoice | None:
    """As `choose`, each process looking at its share of the files; all must call this and get the same."""

    def damaged(target: Path) -> str:
        found = parallel.collect(damage(target, (parallel.rank, parallel.size)))
        return next((text for text in found if text), "")

    return choose(folder, fallback, damaged)


def load_placed(target: Path, template: Template, parallel: Parallel) -> RunCheckpoint:
    """A checkpoint of either kind, placed as this run needs it.

    Args:
        target: `<run>/checkpoints/step-N`.
        template: gives a tensor of this run for every saved one; where that is sharded (and of the saved shape), the loaded
            tensor is sharded alike. Anything else is loaded whole.

    Raises:
        DamagedFile: it cannot be read.
    """
    if not (target / SHARDS).is_dir():
        found = read_checkpoint(target)
        placed = {p: {k: placed_like(v, template(p, k)) for k, v in getattr(found, p).items()} for p in PARTS}
        return RunCheckpoint(**placed, state=found.state)
    state = read_state(target)
    with reading(target / SHARDS, "a sharded checkpoint"):
        tensors = _read_shards(target / SHARDS, template, parallel)
    parts: dict[str, dict[str, Tensor]] = {part: {} for part in PARTS}
    for key, value in tensors.items():
        part, own = key.split(".", 1)
        parts[part][own] = value
    return RunCheckpoint(**parts, state=state)


def _read_shards(folder: Path, template: Template, parallel: Parallel) -> dict[str, Tensor]:
    reader = dcp.HuggingFaceStorageReader(str(folder))
    tensors: dict[str, Tensor] = {}
    for key, meta in reader.read_metadata().state_dict_metadata.items():
        assert isinstance(meta, TensorStorageMetadata)  # the safetensors format holds nothing else
        part, name = key.split(".", 1)
        like, dtype = template(part, name), meta.properties.dtype
        if isinstance(like, DTensor) and like.shape == meta.size:
            tensors[key] = torch.zeros_like(like.detach(), dtype=dtype)
        else:
            tensors[key] = torch.empty(meta.size, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns that one process is one process
        dcp.load(tensors, storage_reader=reader, process_group=parallel.saving, no_dist=not parallel.grouped)
    return tensors
