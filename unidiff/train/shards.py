"""Checkpoints of several processes, through `torch.distributed.checkpoint`: each writes its shards, in the background.

The storage is DCP's safetensors format (no pickle): `step-N/shards/shard-*.safetensors`, with the place of every piece in
the file's header, so that any number of processes can read them. Tensors are named `model.X`, `ema.X`, `optimiser.X`.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

from unidiff.train.checkpoint import (
    PARTS,
    Checkpoint,
    latest_name,
    load_checkpoint,
    publish,
    read_state,
    step_name,
    write_atomic,
)
from unidiff.train.distributed import Parallel, placed_like

_SHARDS = "shards"
Template = Callable[[str, str], Tensor | None]  # (part, name) -> a tensor placed as the loaded one shall be


class ShardSaver:
    """Writes checkpoints of a run of several processes into `folder`, which all of them must see.

    `save` returns when the state is copied; writing goes on in a thread. A checkpoint counts, and the pointer moves, when
    every process has written its part.

    Args:
        folder: `<run>/checkpoints`.
        keep: newest checkpoints kept, besides the best.
        background: whether `save` returns before all is on the disk.
    """

    def __init__(self, folder: Path, keep: int, background: bool, parallel: Parallel) -> None:
        self.folder, self.keep, self.background, self.parallel = folder, keep, background, parallel
        self._pending: tuple[Future[Any], str] | None = None

    def save(self, checkpoint: Checkpoint) -> None:
        """Start writing; all processes must call this with their part of the same step."""
        self.wait()
        name = step_name(checkpoint.state["step"])
        temporary = self.folder / f".{name}.shards.tmp"
        done = False
        if self.parallel.main:
            self.folder.mkdir(parents=True, exist_ok=True)
            done = latest_name(self.folder) == name
            shutil.rmtree(temporary, ignore_errors=True)
            (temporary / _SHARDS).mkdir(parents=True)
            write_atomic(temporary / "state.json", json.dumps(checkpoint.state, indent=1))
        if self.parallel.agree(done)[0]:
            return
        tensors = {f"{part}.{k}": v.detach() for part in PARTS for k, v in getattr(checkpoint, part).items()}
        writer = dcp.HuggingFaceStorageWriter(str(temporary / _SHARDS), save_distributed=True)
        pending = dcp.async_save(tensors, storage_writer=writer, process_group=self.parallel.saving)
        assert isinstance(pending, Future)
        self._pending = pending, name
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
        (pending, name), self._pending = self._pending, None
        pending.result()  # on rank 0 this means that all ranks have written: the writing ends with a message to it
        if self.parallel.main:
            final, temporary = self.folder / name, self.folder / f".{name}.shards.tmp"
            shutil.rmtree(final, ignore_errors=True)  # complete, but of a run that was killed before it pointed there
            os.replace(temporary, final)
            publish(self.folder, name, self.keep)


def load_placed(folder: Path, template: Template, parallel: Parallel) -> Checkpoint | None:
    """The checkpoint that `latest` names, of either kind, placed as this run needs it; None when there is none.

    Args:
        folder: `<run>/checkpoints`.
        template: gives a tensor of this run for every saved one; where that is sharded (and of the saved shape), the loaded
            tensor is sharded alike. Anything else is loaded whole.

    Raises:
        ValueError: `latest` names a folder that is missing or incomplete.
    """
    name = latest_name(folder)
    if name is None:
        return None
    if not (folder / name / _SHARDS).is_dir():
        found = load_checkpoint(folder)
        assert found is not None
        placed = {p: {k: placed_like(v, template(p, k)) for k, v in getattr(found, p).items()} for p in PARTS}
        return Checkpoint(**placed, state=found.state)
    state = read_state(folder, name, [_SHARDS])
    tensors = _read_shards(folder / name / _SHARDS, template, parallel)
    parts: dict[str, dict[str, Tensor]] = {part: {} for part in PARTS}
    for key, value in tensors.items():
        part, own = key.split(".", 1)
        parts[part][own] = value
    return Checkpoint(**parts, state=state)


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
