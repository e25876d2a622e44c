"""The training step: one function, from clean tokens to updated weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from unidiff.diffusion.objective import joint_elbo, masked_nll
from unidiff.diffusion.process import NoisyBatch, mask_tokens
from unidiff.models.transformer import MaskedTransformer
from unidiff.tokens import Modality, Vocabulary
from unidiff.train.config import TASKS, ParallelConfig
from unidiff.train.distributed import Parallel
from unidiff.train.ema import EMA
from unidiff.train.optim import Optimisers
from unidiff.train.tasks import TaskBatch


@dataclass
class TrainState:
    """What a step changes, and what it needs to change it.

    Attributes:
        model: its parameters are what `optimisers` and `ema` hold.
        hidden: `model.hidden`, possibly compiled.
        parallel: the processes of the run; alone by default.
        step: optimiser steps taken, skipped ones included.
        bad_steps: consecutive steps skipped for a loss or gradient that was not finite.
        skipped: all such steps of the run.
    """

    model: MaskedTransformer
    hidden: Callable[..., Tensor]
    vocabulary: Vocabulary
    optimisers: Optimisers
    ema: EMA
    bf16: bool
    chunk: int
    step: int = 0
    bad_steps: int = 0
    skipped: int = 0
    parallel: Parallel = field(default_factory=lambda: Parallel(torch.device("cpu"), ParallelConfig()))

    def __post_init__(self) -> None:
        self.token_nll = self.parallel.forward(self.model, self._token_nll)

    def _token_nll(self, noisy: NoisyBatch, clean: TaskBatch) -> Tensor:
        x_t = noisy.batch
        # 2. transformer: hidden states of x_t
        hidden = self.hidden(
            x_t.ids, x_t.modality, x_t.positions, attention_mask=x_t.attention_mask(), time=clean.rate.float()
        )  # [B, L, D]
        # 3. NLL at hidden positions only, each through its modality's slice of the head
        return masked_nll(hidden, self.model, noisy.masked, clean.batch, self.vocabulary, self.chunk, clean.weight)


@dataclass(frozen=True)
class StepReport:
    """Numbers of one step over all processes, on the CPU.

    Attributes:
        loss: the training loss.
        grad_norm: before clipping.
        finite: False when the step was skipped.
        nll: float32 `[tasks, 2]`, summed nats at hidden positions per task and modality.
        hidden: float32 `[tasks, 2]`, how many there were.
        rows: float32 `[tasks]`.
    """

    loss: float
    grad_norm: float
    finite: bool
    nll: Tensor
    hidden: Tensor
    rows: Tensor


def train_step(state: TrainState, batches: Sequence[TaskBatch], rate_factor: float) -> StepReport:
    """One optimiser step over `batches` (more than one accumulate), as if they were a single batch.

    Args:
        state: changed in place.
        batches: equal-shaped mixed-task batches `[B, L]` on the model's device: this process's rows.
        rate_factor: factor on the peak learning rate.

    The loss is sum of weight * NLL over hidden targets, divided by all valid targets of the step, hidden or not, those of
    all processes: gradients are averaged over processes, so each divides by the global number over how many they are.
    """
    device, parallel = batches[0].batch.ids.device, state.parallel
    normalizer: Tensor = sum(b.batch.targets.sum() for b in batches)  # type: ignore[assignment]
    if parallel.size > 1:
        normalizer = parallel.sum(normalizer) / parallel.size
    loss = torch.zeros((), device=device)
    sums = torch.zeros(3, len(TASKS), 2, device=device)  # nll, hidden, rows per (task, modality)
    state.optimisers.zero_grad()
    for micro in batches:
        with parallel.accumulating(last=micro is batches[-1]):
            # 1. hide: x_t, with exactly ceil(rate * targets) hidden per row
            noisy = mask_tokens(micro.batch, micro.rate, state.vocabulary, micro.noise)
            with torch.autocast(device.type, torch.bfloat16, enabled=state.bf16):
                nll = state.token_nll(noisy, micro)  # steps 2 and 3
            # 4. loss: weighted, normalised by the valid targets of the whole step
            terms = joint_elbo(nll, micro.weight, micro.batch, normalizer=normalizer)
            # 5. backward
            terms.total.backward()
        loss += terms.total.detach()
        _add_sums(sums, nll.detach(), noisy.masked, micro)
    # 6. clip, and refuse to step on numbers that are not finite
    numbers = parallel.sum(torch.cat([loss[None], sums.flatten()]))
    loss, sums = numbers[0] / parallel.size, numbers[1:].view_as(sums)
    norm = state.optimisers.clip()
    state.optimisers.set_rate(rate_factor)
    state.step += 1
    finite = bool(torch.isfinite(loss) & torch.isfinite(norm))
    if finite:
        # 7. optimiser, 8. moving average
        state.optimisers.step()
        state.ema.update()
        state.bad_steps = 0
    else:
        state.bad_steps += 1
        state.skipped += 1
    sums = sums.cpu()
    return StepReport(float(loss), float(norm), finite, sums[0], sums[1], sums[2, :, 0])


def _add_sums(sums: Tensor, nll: Tensor, masked: Tensor, micro: TaskBatch) -> None:
    for modality in Modality:
        where = masked & (micro.batch.modality == modality)
        sums[0, :, modality].index_add_(0, micro.task, torch.where(where, nll, 0).sum(1).float())
        sums[1, :, modality].index_add_(0, micro.task, where.sum(1).float())
    sums[2, :, 0].index_add_(0, micro.task, torch.ones(len(micro.task), device=sums.device))
