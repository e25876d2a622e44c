"""What a CUDA graph does, on any device: the operations of a pass are noted once and repeated in the same memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
READS = {  # a CUDA graph cannot be recorded where the host asks for a result, or brings numbers of its own
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.equal.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.lift_fresh.default,
}


class Tape(TorchDispatchMode):
    """Notes every operation with its results; `repeat` does them again and puts the results where they were."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        masks = [x for x in tree_leaves(args[1:]) if isinstance(x, Tensor) and x.dtype == torch.bool]
        if func in READS or (func in (aten.index.Tensor, aten.index_put_.default) and masks):
            raise RuntimeError(f"{func} asks the device for a result")
        out = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, out))
        return out

    def repeat(self) -> None:
        for func, args, kwargs, out in self.operations:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class TapeRecorder:
    """A `Record`; `tapes` are all of them, in turn, and `repeated` says how often one was repeated."""

    def __init__(self) -> None:
        self.tapes: list[Tape] = []
        self.repeated = 0

    def __call__(self, work: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        tape, started = Tape(), False
        with tape:
            result = work()
        self.tapes.append(tape)

        def replay() -> None:
            nonlocal started
            if started:  # the first time, the recording itself has done it (a CUDA graph's does nothing)
                tape.repeat()
                self.repeated += 1
            started = True

        return result, replay
