"""Measures training: the matmul peak, the head and its loss in two ways, and whole steps split into their parts."""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median_high
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from unidiff.diffusion.objective import head_parts, parts_loss
from unidiff.models.transformer import MaskedTransformer
from unidiff.process import clock, free_memory, timed
from unidiff.tokens import Vocabulary
from unidiff.train.config import ObjectiveConfig, ParallelConfig, TaskConfig, TasksConfig, TrainConfig
from unidiff.train.cost.plan import GIB, ModelSize, TrainingRow, make_plan, model_size, row_flops
from unidiff.train.data.source import TokenTable
from unidiff.train.data.tasks import TaskMixer
from unidiff.train.optim import EMA, Optimisers
from unidiff.train.run.distributed import Parallel
from unidiff.train.step import TokenNLL, TrainState, train_step

_USED = 0.8  # of the free memory; allocators waste some
_DENSE = 20  # bytes for each logit of the log-softmax over all ids: bf16 and float32, forward and backward
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class TrainingLoad:
    """A run's model and shapes, with random tokens in place of its data; `config.data.grid` is set."""

    config: TrainConfig
    vocabulary: Vocabulary
    device: str = "cpu"

    @property
    def row(self) -> TrainingRow:
        sizes = self.vocabulary.text_size, self.vocabulary.image_size
        return TrainingRow(self.config.data.text_length, self.config.data.grid**2, *sizes)

    @property
    def size(self) -> ModelSize:
        return model_size(self.config.model, self.vocabulary.size)

    @property
    def bf16(self) -> bool:
        """Whether matmuls run under autocast."""
        return self.config.precision == "bf16"

    def with_rows(self, rows: int) -> TrainingLoad:
        """The same with other rows per step."""
        return replace(self, config=replace(self.config, batch_size=rows))


def matmul_peak(device: str, bf16: bool, seconds: float = 1.0) -> float:
    """Best rate of square matmuls in FLOP/s, over sizes that fill the machine."""
    sizes = (1024, 2048) if device == "cpu" else (4096, 8192)
    best = 0.0
    for size in sizes:
        a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16 if bf16 else torch.float32) for _ in "ab")
        a @ b
        end = time.perf_counter() + seconds / len(sizes)
        while time.perf_counter() < end:
            best = max(best, 2 * size**3 / timed(partial(torch.matmul, a, b), torch.device(device))[1])
    return best


@dataclass(frozen=True)
class HeadTiming:
    """Forward and backward of head and loss. Seconds are the best of the repeats; memory is above what was there before."""

    seconds: float
    dense_seconds: float
    memory_mib: float
    dense_memory_mib: float

    @property
    def speedup(self) -> float:
        return self.dense_seconds / self.seconds

    @property
    def memory_ratio(self) -> float:
        return self.dense_memory_mib / max(self.memory_mib, 1e-9)


def measure_head(work: TrainingLoad, repeats: int = 3) -> HeadTiming:
    """Head and loss of one step, by `masked_nll` and by a log-softmax over all ids at all positions, turn by turn.

    Half the positions of each modality are masked, what uniform times give on average.
    """
    torch.manual_seed(0)
    width, chunk = work.size.hidden_size, work.config.objective.chunk
    head = _Head((torch.randn(work.vocabulary.size, width, device=work.device) * 0.02).requires_grad_())
    batch = _random_rows(work).batch(0, work.config.batch_size).batch.to(work.device)
    masked = (torch.arange(work.row.length, device=work.device) % 2 == 0).expand(batch.shape)
    hidden = torch.randn(*batch.shape, width, device=work.device, requires_grad=True)
    parts, ones = head_parts(masked, batch, work.vocabulary, chunk), torch.ones(batch.shape, device=work.device)

    def streamed() -> None:
        with torch.autocast(work.device, torch.bfloat16, enabled=work.bf16):
            loss, _ = parts_loss(hidden, head, parts, ones)
        loss.backward()

    def dense() -> None:
        with torch.autocast(work.device, torch.bfloat16, enabled=work.bf16):
            logits = F.linear(hidden, head.weight)  # [B, L, V]
        log_probs = logits.float().log_softmax(-1)
        nll = -log_probs.gather(-1, batch.ids[..., None])[..., 0]
        (nll * masked).sum().backward()

    seconds: list[list[float]] = [[], []]
    memory: list[list[float]] = [[], []]
    for _ in range(repeats):
        for number, step in enumerate((streamed, dense)):
            hidden.grad, head.weight.grad = torch.zeros_like(hidden), torch.zeros_like(head.weight)
            before = _reset_peak(work.device)
            seconds[number].append(timed(step, torch.device(work.device))[1])
            memory[number].append(_peak(work.device) - before)
    return HeadTiming(min(seconds[0]), min(seconds[1]), max(memory[0]) / 2**20, max(memory[1]) / 2**20)


@dataclass(frozen=True)
class StepTiming:
    """Whole optimiser steps.

    Attributes:
        parts: seconds of `data`, `forward`, `head_and_loss` (forward and backward), `backward` (of the blocks) and
            `optimiser` (clipping, update, moving average) in the step of the median, so that they add up to it.
    """

    seconds: float  # median of a step, data included
    parts: dict[str, float]
    tokens_per_second: float
    flops_per_step: float  # useful operations, see `unidiff.train.cost.plan`
    peak_flops: float  # the matmul rate measured beside it
    memory_mib: float  # peak of the process (CPU) or of the allocator (GPU)
    parameters: int

    @property
    def mfu(self) -> float:
        """Share of the measured peak that did useful work."""
        return self.flops_per_step / self.seconds / self.peak_flops


def measure_step(work: TrainingLoad, steps: int = 5, warmup: int = 1) -> StepTiming:
    """Run `warmup + steps` steps of joint training on random tokens."""
    torch.manual_seed(0)
    config, device, rows = work.config, torch.device(work.device), work.config.batch_size
    model = MaskedTransformer(vocab_size=work.vocabulary.size, **config.model)
    model.to(device).train()  # type: ignore[arg-type]  # diffusers' decorator hides the signature
    if config.compile:
        model.hidden = torch.compile(model.hidden)  # type: ignore[method-assign]
    optimisers = Optimisers(model, config.optimiser)
    watch = _Stopwatch(work.device, model, optimisers)
    token_nll = TokenNLL(model, work.vocabulary, config.objective.chunk, work.bf16)
    parallel = Parallel(device, ParallelConfig())
    state = TrainState(token_nll, optimisers, EMA(model, config.ema.decay), parallel=parallel)
    mixer = _random_rows(work)
    totals, splits, peaks = [], [], []
    _reset_peak(work.device)
    for step in range(warmup + steps):
        watch.start()
        batch = mixer.batch(step * rows, rows)
        watch.mark("data")
        train_step(state, [batch], 1.0)
        watch.mark("optimiser")
        if step >= warmup:
            totals.append(sum(watch.parts.values()))
            splits.append(watch.parts)
            peaks.append(matmul_peak(work.device, work.bf16, 0.3))  # beside the step: shared machines drift
    seconds = median_high(totals)
    return StepTiming(
        seconds=seconds,
        parts=splits[totals.index(seconds)],
        tokens_per_second=rows * work.row.length / seconds,
        flops_per_step=rows * row_flops(work.size, work.row).total,
        peak_flops=median_high(peaks),
        memory_mib=_peak(work.device) / 2**20,
        parameters=work.size.total,
    )


class FittedLoads(NamedTuple):
    """What of a load fits into memory: `head` for `measure_head`, `step` for `measure_step`, and `notes` on what was cut."""

    head: TrainingLoad
    step: TrainingLoad
    notes: tuple[str, ...]


def fit_to_memory(work: TrainingLoad, free: int | None) -> FittedLoads:
    """Fewer rows where the estimated memory of a measurement is more than is free.

    Args:
        free: bytes; None where that is not known, and nothing is cut.

    Raises:
        ValueError: not even one row fits.
    """
    if free is None:
        return FittedLoads(work, work, ())
    asked, ids = work.config.batch_size, work.vocabulary.size
    layout = make_plan(work.with_rows(1).config, 1).layouts[0]
    needs = {  # bytes whatever the rows, and bytes of each row
        "head and loss": (16 * ids * work.size.hidden_size, _DENSE * work.row.length * ids),
        "step": (layout.weights + layout.head, layout.activations),
    }
    works, notes = [], []
    for name, (fixed, per_row) in needs.items():
        rows = int((free * _USED - fixed) // max(per_row, 1))
        if rows < 1:
            raise ValueError(
                f"one row of the measurement of {name} needs {(fixed + per_row) / GIB:.1f} GiB of memory, and "
                f"{free / GIB:.1f} are free; use a smaller model, fewer tokens, or another machine"
            )
        works.append(work.with_rows(min(asked, rows)))
        if rows < asked:
            needed = (fixed + asked * per_row) / GIB
            notes.append(
                f"{name}: {rows} of {asked} rows, which would need {needed:.1f} GiB; {free / GIB:.1f} GiB are free"
            )
    return FittedLoads(works[0], works[1], tuple(notes))


def free_bytes(device: str) -> int | None:
    """Memory that is free where a workload runs; None where the system does not say."""
    return torch.cuda.mem_get_info(device)[0] if device.startswith("cuda") else free_memory()


def head_flops_ratio(work: TrainingLoad) -> float:
    """Operations of the head over the whole vocabulary at all positions, per operation that the loss needs."""
    row, size = work.row, work.size
    dense = 3 * 2 * size.hidden_size * row.length * (row.text_slice + row.image_slice)
    return dense / row_flops(size, row).head


class _Head(NamedTuple):
    weight: Tensor

    def head_parameters(self) -> tuple[Tensor, Tensor | None]:
        return self.weight, None


class _Stopwatch:
    """Marks inside a step that the step itself knows nothing of: calls of `hidden` and `clip`, and the gradient of the
    hidden states, which is there when the head's backward pass is done."""

    def __init__(self, device: str, model: Any, optimisers: Any) -> None:
        self.device = torch.device(device)
        self.start()
        hidden, clip = model.hidden, optimisers.clip

        def timed_hidden(*args: Any, **options: Any) -> Tensor:
            out: Tensor = hidden(*args, **options)
            self.mark("forward")
            out.register_hook(lambda grad: self.mark("head_and_loss"))
            return out

        def timed_clip() -> Tensor:
            self.mark("backward")
            return clip()

        model.hidden, optimisers.clip = timed_hidden, timed_clip

    def start(self) -> None:
        self.parts: dict[str, float] = {}
        self._last = clock(self.device)

    def mark(self, name: str) -> None:
        now = clock(self.device)
        self.parts[name] = self.parts.get(name, 0.0) + now - self._last
        self._last = now


def _random_rows(work: TrainingLoad, rows: int = 64) -> TaskMixer:
    generator, data, ids = torch.Generator().manual_seed(0), work.config.data, work.vocabulary
    tensors = {
        "codes": torch.randint(0, ids.image_size, (rows, data.grid, data.grid), generator=generator),
        "captions": torch.randint(1, ids.text_size, (rows, data.text_length), generator=generator),
    }
    joint = TasksConfig(generate=TaskConfig(weight=1.0, loss="elbo"))
    return TaskMixer(TokenTable(tensors, ids), joint, ObjectiveConfig(), seed=0)


def _reset_peak(device: str) -> float:
    """Forget the peak so far; bytes in use now (0 where the system does not tell)."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    if not _CLEAR.exists():
        return 0.0
    _CLEAR.write_text("5")
    return _status_bytes("VmRSS")


def _peak(device: str) -> float:
    return torch.cuda.max_memory_allocated() if device.startswith("cuda") else _status_bytes("VmHWM")


def _status_bytes(name: str) -> float:
    if not _STATUS.exists():
        return 0.0
    line = next(x for x in _STATUS.read_text().splitlines() if x.startswith(name + ":"))
    return int(line.split()[1]) * 1024.0
