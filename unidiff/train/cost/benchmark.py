"""Measures training: the matmul peak, the head and its loss in two ways, and whole steps split into their parts."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median_high
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unidiff.diffusion.objective import masked_nll
from unidiff.models.transformer import MaskedTransformer
from unidiff.process import free_memory
from unidiff.tokens import Vocabulary
from unidiff.train.config import ObjectiveConfig, TaskConfig, TasksConfig, TrainConfig
from unidiff.train.cost.plan import GIB, TrainingRow, make_plan, model_size, row_flops
from unidiff.train.data.source import TokenTable
from unidiff.train.data.tasks import TaskMixer
from unidiff.train.optim import EMA, Optimisers
from unidiff.train.step import TokenNLL, TrainState, train_step

_USED = 0.8  # of the free memory; allocators waste some
_DENSE = 20  # bytes for each logit of the log-softmax over all ids: bf16 and float32, forward and backward
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class TrainingLoad:
    """A model and the shape of its rows; tokens are random.

    Attributes:
        model: `MaskedTransformer` arguments.
        text_size, image_size: ids of each modality.
        text_length, grid: tokens of a row: text, then grid x grid codes.
        batch_size: rows per step.
        bf16: matmuls under autocast.
        chunk: masked positions per piece of the head.
        device: where it runs.
    """

    model: dict[str, Any]
    text_size: int
    image_size: int
    text_length: int
    grid: int
    batch_size: int
    bf16: bool = True
    chunk: int = 1024
    device: str = "cpu"

    @property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary.unified(self.text_size, self.image_size, {"eos": 0})

    @property
    def length(self) -> int:
        return self.text_length + self.grid**2

    @property
    def row(self) -> TrainingRow:
        return TrainingRow(self.text_length, self.grid**2, self.text_size, self.image_size)


def workload_of(config: TrainConfig, vocabulary: Vocabulary, grid: int, device: str) -> TrainingLoad:
    """The shapes of a run, with random tokens in place of its data."""
    return TrainingLoad(
        dict(config.model),
        vocabulary.text_size,
        vocabulary.image_size,
        config.data.text_length,
        grid,
        config.batch_size,
        config.precision == "bf16",
        config.objective.chunk,
        device,
    )


def matmul_peak(device: str, bf16: bool, seconds: float = 1.0) -> float:
    """Best rate of square matmuls in FLOP/s, over sizes that fill the machine."""
    sizes = (1024, 2048) if device == "cpu" else (4096, 8192)
    best = 0.0
    for size in sizes:
        a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16 if bf16 else torch.float32) for _ in "ab")
        a @ b
        end = time.perf_counter() + seconds / len(sizes)
        while time.perf_counter() < end:
            best = max(best, 2 * size**3 / _timed(partial(torch.matmul, a, b), device))
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
    size = model_size(work.model, work.vocabulary.size)
    model = _HeadOnly(work.vocabulary.size, size.hidden_size).to(work.device)
    batch = _random_rows(work).batch(0, work.batch_size).batch.to(work.device)
    masked = (torch.arange(work.length, device=work.device) % 2 == 0).expand(batch.shape)
    hidden = torch.randn(*batch.shape, model.weight.shape[1], device=work.device, requires_grad=True)
    vocabulary, ones = work.vocabulary, torch.ones(batch.shape, device=work.device)

    def streamed() -> None:
        with torch.autocast(work.device, torch.bfloat16, enabled=work.bf16):
            nll = masked_nll(hidden, model, masked, batch, vocabulary, work.chunk, weight=ones)
        nll.sum().backward()

    def dense() -> None:
        with torch.autocast(work.device, torch.bfloat16, enabled=work.bf16):
            logits = F.linear(hidden, model.weight)  # [B, L, V]
        log_probs = logits.float().log_softmax(-1)
        nll = -log_probs.gather(-1, batch.ids[..., None])[..., 0]
        (nll * masked).sum().backward()

    seconds, memory = [[], []], [[], []]  # type: list[list[float]], list[list[float]]
    for _ in range(repeats):
        for number, step in enumerate((streamed, dense)):
            hidden.grad, model.weight.grad = torch.zeros_like(hidden), torch.zeros_like(model.weight)
            before = _reset_peak(work.device)
            seconds[number].append(_timed(step, work.device))
            memory[number].append(_peak(work.device) - before)
    return HeadTiming(min(seconds[0]), min(seconds[1]), max(memory[0]) / 2**20, max(memory[1]) / 2**20)


@dataclass(frozen=True)
class StepTiming:
    """Whole optimiser steps.

    Attributes:
        seconds: median of a step, data included.
        parts: seconds of `data`, `forward`, `head_and_loss` (forward and backward), `backward` (of the blocks) and
            `optimiser` (clipping, update, moving average) in the step of that median, so that they add up to it.
        tokens_per_second: text and image tokens.
        flops_per_step: useful operations, see `unidiff.train.cost.plan`.
        peak_flops: the matmul rate measured beside it.
        memory_mib: peak of the process (CPU) or of the allocator (GPU).
        parameters: of the model.
    """

    seconds: float
    parts: dict[str, float]
    tokens_per_second: float
    flops_per_step: float
    peak_flops: float
    memory_mib: float
    parameters: int

    @property
    def mfu(self) -> float:
        """Share of the measured peak that did useful work."""
        return self.flops_per_step / self.seconds / self.peak_flops


def measure_step(work: TrainingLoad, config: TrainConfig, steps: int = 5, warmup: int = 1) -> StepTiming:
    """Run `warmup + steps` steps of joint training on random tokens; optimiser and average as in `config`."""
    torch.manual_seed(0)
    device = torch.device(work.device)
    model = MaskedTransformer(vocab_size=work.vocabulary.size, **work.model)
    model.to(device).train()  # type: ignore[arg-type]  # diffusers' decorator hides the signature
    watch = _Stopwatch(work.device)
    optimisers = Optimisers(model, config.optimiser)
    hidden = watch.around_hidden(torch.compile(model.hidden) if config.compile else model.hidden)
    model.hidden = hidden  # type: ignore[method-assign]
    token_nll = TokenNLL(model, work.vocabulary, work.chunk, work.bf16)
    state = TrainState(token_nll, watch.around_clip(optimisers), EMA(model, config.ema.decay))
    mixer = _random_rows(work)
    totals, splits, peaks = [], [], []
    _reset_peak(work.device)
    for step in range(warmup + steps):
        watch.start()
        batch = mixer.batch(step * work.batch_size, work.batch_size).to(device)
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
        tokens_per_second=work.batch_size * work.length / seconds,
        flops_per_step=work.batch_size * row_flops(model_size(work.model, work.vocabulary.size), work.row).total,
        peak_flops=median_high(peaks),
        memory_mib=_peak(work.device) / 2**20,
        parameters=sum(p.numel() for p in model.parameters()),
    )


@dataclass(frozen=True)
class FittedLoads:
    """What of a workload fits into memory: `head` for `measure_head`, `step` for `measure_step`, and `notes` on what was cut."""

    head: TrainingLoad
    step: TrainingLoad
    notes: tuple[str, ...]


def fit_to_memory(work: TrainingLoad, config: TrainConfig, free: int | None) -> FittedLoads:
    """Fewer rows where the estimated memory of a measurement is more than is free.

    Args:
        config: what `work` was made of. free: bytes; None where that is not known, and nothing is cut.

    Raises:
        ValueError: not even one row fits.
    """
    if free is None:
        return FittedLoads(work, work, ())
    usable, size = free * _USED, model_size(work.model, work.vocabulary.size)
    layout = make_plan(replace(config, batch_size=1), 1).layouts[0]
    needs = {  # bytes whatever the rows, and bytes of each row
        "head and loss": (16 * work.vocabulary.size * size.hidden_size, _DENSE * work.length * work.vocabulary.size),
        "step": (layout.weights + layout.head, layout.activations),
    }
    works, notes = [], []
    for name, (fixed, per_row) in needs.items():
        rows = int((usable - fixed) // max(per_row, 1))
        if rows < 1:
            raise ValueError(
                f"one row of the measurement of {name} needs {(fixed + per_row) / GIB:.1f} GiB of memory, and "
                f"{free / GIB:.1f} are free; use a smaller model, fewer tokens, or another machine"
            )
        works.append(replace(work, batch_size=min(work.batch_size, rows)))
        if rows < work.batch_size:
            asked = (fixed + work.batch_size * per_row) / GIB
            notes.append(
                f"{name}: {rows} of {work.batch_size} rows, which would need {asked:.1f} GiB; {free / GIB:.1f} GiB are free"
            )
    return FittedLoads(works[0], works[1], tuple(notes))


def free_bytes(device: str) -> int | None:
    """Memory that is free where a workload runs; None where the system does not say."""
    return torch.cuda.mem_get_info(device)[0] if device.startswith("cuda") else free_memory()


def head_flops_ratio(work: TrainingLoad) -> float:
    """Operations of the head over the whole vocabulary at all positions, per operation that the loss needs."""
    row, size = work.row, model_size(work.model, work.vocabulary.size)
    dense = 3 * 2 * size.hidden_size * row.length * (row.text_slice + row.image_slice)
    return dense / row_flops(size, row).head


class _HeadOnly(nn.Module):
    def __init__(self, vocab_size: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(vocab_size, width) * 0.02)

    def head_parameters(self) -> tuple[Tensor, Tensor | None]:
        return self.weight, None


class _Stopwatch:
    """Marks inside a step that the step itself knows nothing of: calls of `hidden` and `clip`, and the gradient of the
    hidden states, which is there when the head's backward pass is done."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.parts: dict[str, float] = {}
        self._last = 0.0

    def start(self) -> None:
        self.parts = {}
        self._last = _now(self.device)

    def mark(self, name: str) -> None:
        now = _now(self.device)
        self.parts[name] = self.parts.get(name, 0.0) + now - self._last
        self._last = now

    def around_hidden(self, hidden: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def timed(*args: Any, **kwargs: Any) -> Tensor:
            out = hidden(*args, **kwargs)
            self.mark("forward")
            out.register_hook(lambda grad: self.mark("head_and_loss"))
            return out

        return timed

    def around_clip(self, optimisers: Optimisers) -> Optimisers:
        clip = optimisers.clip

        def timed() -> Tensor:
            self.mark("backward")
            return clip()

        optimisers.clip = timed  # type: ignore[method-assign]
        return optimisers


def _random_rows(work: TrainingLoad, rows: int = 64) -> TaskMixer:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "codes": torch.randint(0, work.image_size, (rows, work.grid, work.grid), generator=generator),
        "captions": torch.randint(1, work.text_size, (rows, work.text_length), generator=generator),
    }
    uniform = TasksConfig(generate=TaskConfig(weight=1.0, loss="elbo"))
    return TaskMixer(TokenTable(tensors, work.vocabulary), uniform, ObjectiveConfig(), seed=0)


def _now(device: str) -> float:
    """Seconds, when all work that was handed to the device is done."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


def _timed(run: Callable[[], object], device: str) -> float:
    start = _now(device)
    run()
    return _now(device) - start


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
