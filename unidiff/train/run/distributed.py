"""Many processes, one run: process groups, replicated or sharded models, and what the ranks must agree on.

Every rank takes its slice of the global batch by global sample index, and times and masks are keyed by that index, so the
number of ranks changes nothing but rounding. Gradients are averaged over ranks; the loss is therefore divided by the
global number of valid targets over the number of ranks. Torch does the work: DDP, or FSDP2 (`fully_shard`, per block).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from unidiff.errors import explain, first_line
from unidiff.files import locked
from unidiff.models.transformer import MaskedTransformer
from unidiff.train.config import ParallelConfig, TrainConfig

_PATIENCE = timedelta(days=2)  # ranks wait this long while rank 0 encodes raw shards, or for a slow disk


class Launch(NamedTuple):
    """Where a process stands among those of a run, as `torchrun` tells it (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_*)."""

    rank: int
    world_size: int
    local_rank: int
    address: str
    port: int


def launch_of(environment: Mapping[str, str]) -> Launch | None:
    """This process among those that `torchrun` started; None when it did not. Raises ValueError for numbers that are none,
    or do not fit each other."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
    if not all(name in environment for name in (*names, "MASTER_ADDR")):
        return None
    for name in names:
        if not (environment[name].isascii() and environment[name].isdigit()):
            raise ValueError(f"{name} is {environment[name]!r}; torchrun sets it to a number")
    rank, size, local, port = (int(environment[name]) for name in names)
    if not (rank < size and local < size and 0 < port < 2**16):
        raise ValueError(
            f"RANK {rank}, LOCAL_RANK {local}, WORLD_SIZE {size} and MASTER_PORT {port} do not fit together"
        )
    return Launch(rank, size, local, environment["MASTER_ADDR"], port)


class Parallel:
    """The processes of a run. Without a `Launch` there is one, no process group, and every method is the identity.

    Args:
        device: of the run; CUDA runs take device `local_rank` of their machine and talk over nccl, CPU runs over gloo.
        settings: how the model is spread.

    Attributes:
        rank, size: of this process, and how many there are. device: of this process.
        replica: the model as DDP wraps it, in that mode.
        saving: a gloo group for nothing but checkpoints, which are written while the other groups are in use; or None.
    """

    def __init__(self, device: torch.device, settings: ParallelConfig, launch: Launch | None = None) -> None:
        self.device, self.settings = device, settings
        self.rank, self.size = (launch.rank, launch.world_size) if launch else (0, 1)
        self.saving: dist.ProcessGroup | None = None
        self._control: dist.ProcessGroup | None = None
        self.replica: DistributedDataParallel | None = None
        self._sharded: MaskedTransformer | None = None
        self._held: set[Path] = set()
        if launch:
            self._start(launch)

    def _start(self, launch: Launch) -> None:
        cuda = self.device.type == "cuda"
        if cuda:
            self.device = torch.device("cuda", launch.local_rank)
            torch.cuda.set_device(self.device)
        host = f"[{launch.address}]" if ":" in launch.address else launch.address
        backend, place = "cpu:gloo,cuda:nccl" if cuda else "gloo", f"tcp://{host}:{launch.port}"
        try:
            dist.init_process_group(backend, init_method=place, rank=self.rank, world_size=self.size)
        except dist.DistError as error:
            raise ValueError(
                f"the {launch.world_size} processes did not meet at {launch.address}:{launch.port} "
                f"({first_line(error)}); check what torchrun was given"
            ) from error
        groups = [dist.new_group(backend="gloo", timeout=_PATIENCE) for _ in range(2)]
        self._control, self.saving = (group for group in groups if isinstance(group, dist.ProcessGroup))

    def close(self) -> None:
        """Leave the process groups."""
        if self.grouped:
            dist.destroy_process_group()
            self._control = self.saving = None

    @property
    def grouped(self) -> bool:
        """Whether there is a process group (also of one process)."""
        return self._control is not None

    @property
    def main(self) -> bool:
        """Whether this process writes logs and exports."""
        return self.rank == 0

    # what a rank computes

    def check(self, config: TrainConfig) -> None:
        """Raise ValueError where settings do not fit the number of ranks."""
        if config.batch_size % self.size:
            raise ValueError(
                f"batch_size = {config.batch_size} must be a multiple of the {self.size} processes; "
                "it counts the rows of all of them"
            )
        replicas = self.settings.replicas
        if self.settings.mode == "fsdp" and self.size % replicas:
            raise ValueError(f"parallel.replicas = {replicas} must divide the number of processes, {self.size}")

    def rows(self, first: int, count: int) -> tuple[int, int]:
        """This rank's slice (first, count) of `count` global samples from `first` on."""
        share = count // self.size
        return first + self.rank * share, share

    def prepare(self, model: MaskedTransformer) -> None:
        """Move the model to the device, sharded in fsdp mode; its parameters are then DTensors. In place.

        Blocks are sharded one by one, so a device never holds more than its shards and one whole block.
        """
        if not (self.grouped and self.settings.mode == "fsdp"):
            model.to(self.device)  # type: ignore[arg-type]  # diffusers' decorator hides the signature
            return
        replicas, kind = self.settings.replicas, self.device.type
        # hybrid: sharded within a group, replicated across groups
        sides = (replicas, self.size // replicas) if replicas > 1 else (self.size,)
        mesh = init_device_mesh(kind, sides, mesh_dim_names=("replicate", "shard")[-len(sides) :])
        param, summed = getattr(torch, self.settings.param_dtype), getattr(torch, self.settings.reduce_dtype)
        # Inputs keep their type: the residual stream stays float32, autocast casts for the matrix products.
        inner = MixedPrecisionPolicy(param_dtype=param, reduce_dtype=summed, cast_forward_inputs=False)
        for block in model.blocks:
            fully_shard(block, mesh=mesh, reshard_after_forward=self.settings.reshard, mp_policy=inner)
        # The root holds embeddings and head: whole from `hidden` to the end of the backward pass, so `head` needs no hook,
        # and in float32, in which the head's gradient is summed over chunks.
        reduce = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
        fully_shard(model, mesh=mesh, reshard_after_forward=False, mp_policy=reduce)
        register_fsdp_forward_method(model, "hidden")
        self._sharded = model

    def forward(self, model: nn.Module, compute: Callable[..., Any]) -> Callable[..., Any]:
        """`compute`, which calls `model`, such that gradients of its result are averaged over ranks."""
        if not self.grouped or self._sharded is not None:
            return compute
        self.replica = DistributedDataParallel(_Compute(model, compute), gradient_as_bucket_view=True)
        return self.replica

    @contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        """Around forward and backward of one micro-batch; gradients travel with the last one only."""
        if self._sharded is not None:
            assert isinstance(self._sharded, FSDPModule)
            self._sharded.set_requires_gradient_sync(last)
        with self.replica.no_sync() if self.replica is not None and not last else nullcontext():
            yield

    def rest(self) -> None:
        """Free the gathered weights that a forward pass without a backward one left; the shards may then be changed."""
        if self._sharded is not None:
            assert isinstance(self._sharded, FSDPModule)
            self._sharded.reshard()

    # what ranks tell each other

    def sum(self, value: Tensor) -> Tensor:
        """Sum over ranks; changes `value` where there are several."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def mean(self, value: Tensor) -> Tensor:
        """Mean over ranks; changes `value` where there are several."""
        return value if self.size == 1 else self.sum(value) / self.size

    def gather(self, value: Tensor) -> Tensor:
        """`[n, ...]` of every rank, joined in the order of ranks: `[ranks * n, ...]`."""
        return value if self.size == 1 else torch.cat(self._all(value.contiguous()))

    def _all(self, value: Tensor, group: dist.ProcessGroup | None = None) -> list[Tensor]:
        parts = [torch.empty_like(value) for _ in range(self.size)]
        dist.all_gather(parts, value, group)
        return parts

    def collect(self, text: str) -> list[str]:
        """The text of every rank, in the order of ranks."""
        if self.size == 1:
            return [text]
        data = torch.tensor(list(text.encode()), dtype=torch.uint8)
        sizes = self._all(torch.tensor([len(data)]), self._control)
        parts = self._all(F.pad(data, (0, int(max(sizes)) - len(data))), self._control)
        return [part[: int(size)].numpy().tobytes().decode() for part, size in zip(parts, sizes, strict=True)]

    def agree(self, *flags: bool) -> tuple[bool, ...]:
        """Each flag, true if it is true on any rank."""
        if self.size == 1:
            return flags
        votes = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(votes, dist.ReduceOp.MAX, self._control)
        return tuple(bool(v) for v in votes)

    @contextmanager
    def locked(self, folder: Path, what: str) -> Iterator[None]:
        """As `unidiff.files.locked`, for all processes of the run together; nothing happens where they hold it already.

        A folder that was made for the lock alone goes with it. Raises ValueError, on all of them, when another run works
        there or the folder cannot be written.
        """
        folder = folder.absolute()
        if folder in self._held:
            yield
            return
        made = [path for path in (folder, *folder.parents) if self.main and not path.exists()]
        with ExitStack() as stack:
            refusal = ""
            if self.main:
                try:
                    if folder.exists() and not folder.is_dir():
                        raise ValueError(f"{str(folder)!r} is a file; name a folder for this {what}")
                    stack.callback(_remove_empty, made)
                    stack.enter_context(locked(folder, what))
                except (ValueError, OSError) as error:
                    refusal = explain(error) or str(error)
            if refusal := self.collect(refusal)[0]:
                raise ValueError(refusal)
            self._held.add(folder)
            stack.callback(self._held.discard, folder)
            yield

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Rank 0 runs the block while the others wait, then they do: for caches that one process must fill."""
        if not self.main:
            self.agree(False)  # waits for all ranks
        yield
        if self.main:
            self.agree(False)


class _Compute(nn.Module):
    """What DDP wants: a module that owns the parameters and whose call makes the graph."""

    def __init__(self, model: nn.Module, compute: Callable[..., Any]) -> None:
        super().__init__()
        self.model, self.compute = model, compute

    def forward(self, *args: Any) -> Any:
        return self.compute(*args)


def lost_peer(error: BaseException) -> bool:
    """Whether an error says that another process of the run has ended, which then has said why."""
    text = str(error).lower()
    words = ("closed by peer", "reset by peer", "broken pipe", "connection refused", "socket closed", "remote process")
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and any(w in text for w in words))


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def whole(value: Tensor) -> Tensor:
    """The full tensor of a sharded one (all ranks must call it), any other as it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def local(value: Tensor) -> Tensor:
    """This rank's shard (the same memory) of a sharded tensor, any other as it is."""
    return value.to_local() if isinstance(value, DTensor) else value


def placed_like(value: Tensor, template: Tensor | None) -> Tensor:
    """`value`, a full tensor that every rank holds, cut up as `template` is where that is sharded and of its shape."""
    if not isinstance(template, DTensor) or template.shape != value.shape:
        return value
    value = value.to(template.device)
    with torch.no_grad():
        shard = torch.zeros_like(template, dtype=value.dtype)
        everywhere = DTensor.from_local(value, template.device_mesh, run_check=False)
        return shard.copy_(everywhere)
