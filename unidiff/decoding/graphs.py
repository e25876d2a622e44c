"""Passes as CUDA graphs: what the GPU does in a pass is recorded once and then started as one.

A pass of a deep model is hundreds of small kernels, and at a few rows the CPU cannot start them as fast as the GPU runs
them. A recorded pass has fixed shapes and fixed memory: its inputs are copied into buffers of its own, and it reads and
writes the features of the request where they lie. Numbers of positions vary from pass to pass, so they are rounded up to
a few widths (`bucket`); padding of an index changes nothing.

A pass can be recorded if it asks the device for nothing on its way, which `recordable` says of a plan. Rows that refresh
apart from others (`CachePlan.fresh`) and layers that compare with an unknown number of results run as they always do.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unidiff.models.denoiser import CachePlan, Denoiser, LayerWork, PartialDenoiser, Select
from unidiff.models.store import FeatureStore, Width
from unidiff.tokens import TokenBatch

Work = Callable[[], Any]
Record = Callable[[Work], tuple[Any, Callable[[], object]]]
"""Takes a function and returns its result, whose tensors hold nothing yet, and what computes them anew at every call."""


class CudaRecorder:
    """Records as CUDA graphs of a device that share one pool of memory: no result of a replay outlives the next one."""

    def __init__(self, device: torch.device) -> None:
        with torch.cuda.device(device):
            self._stream, self._pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def __call__(self, work: Work) -> tuple[Any, Callable[[], object]]:
        """See `Record`."""
        with torch.cuda.device(self._stream.device):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                result = work()
        return result, graph.replay


class _Recorded(NamedTuple):
    inputs: tuple[Tensor, ...]
    result: Any
    replay: Callable[[], object]


class PassGraphs:
    """The recorded passes of one request.

    The first pass of a kind runs as it is, which lets libraries choose their kernels; the second is recorded.

    Args:
        record: how; a `CudaRecorder` on a GPU.
    Attributes:
        recorded, replayed: how many passes were.
    """

    def __init__(self, record: Record) -> None:
        self._record = record
        self._known: dict[Hashable, _Recorded | None] = {}
        self.recorded = self.replayed = 0

    def __call__(self, kind: Hashable, work: Callable[..., Any], *inputs: Tensor) -> Any:
        """`work(*inputs)`.

        Args:
            kind: everything about the pass but the values of `inputs`: two calls of one kind do the same with them.
            work: reads nothing from the device, and reads and writes no memory that moves between passes.
        Returns:
            Its result. Tensors in it are overwritten by the next call: copy what has to stay.
        """
        if kind not in self._known:
            self._known[kind] = None
            return work(*inputs)
        known = self._known[kind]
        if known is None:
            held = tuple(x.clone() for x in inputs)
            result, replay = self._record(lambda: work(*held))
            known = self._known[kind] = _Recorded(held, result, replay)
            self.recorded += 1
        else:
            for buffer, x in zip(known.inputs, inputs, strict=True):
                buffer.copy_(x)
            self.replayed += 1
        known.replay()
        return known.result

    def partial(
        self,
        model: PartialDenoiser,
        ids: Tensor,
        plan: CachePlan,
        store: FeatureStore,
        time: Tensor,
        select: Select,
        place: Hashable,
    ) -> tuple[LayerWork, ...]:
        """`model.partial`, whose results are in the store. The plan must be `recordable`.

        Args:
            place: tells this part of the request's store from its other parts.
        """
        plan = widened(plan, ids.shape[1])
        masks = [x for x in (plan.query, plan.verify, plan.wanted) if x is not None]

        def work(ids: Tensor, time: Tensor, *masks: Tensor) -> tuple[LayerWork, ...]:
            own = iter(masks)
            parts = (None if x is None else next(own) for x in (plan.query, plan.verify, plan.wanted))
            query, verify, wanted = parts
            held = replace(plan, query=query, verify=verify, wanted=wanted, logits=None, others={})
            return model.partial(ids, held, store, time, select).work

        widths = plan.width, plan.compared, plan.chosen
        shape = plan.query is None, plan.verify is None, plan.full, plan.full_layers, widths
        complete = plan.full or bool(
            store.complete.all()
        )  # a full pass makes it so, the first one before any recording
        kind = ("partial", place, complete, None if plan.wanted is None else plan.wanted.shape[1], *shape)
        return self(kind, work, ids, time, *masks)

    def hidden(
        self,
        model: Denoiser,
        ids: Tensor,
        layout: TokenBatch,
        mask: Tensor | None,
        time: Tensor,
        place: Hashable,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """`model.hidden` for rows of a layout that stays the same for the same `place`; in memory of its own."""
        asked = () if wanted is None else (wanted,)

        def work(ids: Tensor, time: Tensor, *asked: Tensor) -> Tensor:
            more = layout.continuous()
            return model.hidden(ids, layout.modality, layout.positions, mask, time, *asked, **more)

        return self(("hidden", place, *(x.shape[1] for x in asked)), work, ids, time, *asked).clone()


def recordable(plan: CachePlan) -> bool:
    """Whether a pass with this plan can be recorded: its sizes are known, and all rows do the same."""
    if plan.full:
        return True
    sized = plan.query is None or plan.width is not None
    compares = plan.verify is None or (plan.compared is not None and plan.chosen is not None)
    return sized and compares and plan.fresh is None and plan.full_rows is None


def widened(plan: CachePlan, length: int) -> CachePlan:
    """The plan with its widths rounded up to those of `bucket`."""

    def rounded(width: Width | None) -> Width | None:
        if isinstance(width, tuple):
            return bucket(width[0], length), bucket(width[1], length)
        return None if width is None else bucket(width, length)

    return replace(plan, width=rounded(plan.width), compared=rounded(plan.compared), chosen=rounded(plan.chosen))


def bucket(width: int, length: int) -> int:
    """`width` rounded up: to multiples of 8, beyond 128 of 16, beyond 256 of 32 and so on; at most the whole row.

    Every doubling has 8 widths, so that a pass of more than 64 positions does at most an eighth more work.
    """
    unit = max(8, (1 << max(width - 1, 0).bit_length()) // 16)
    return min(-(-width // unit) * unit, length)
