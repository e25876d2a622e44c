"""The training step: one function, from clean tokens to updated weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from unidiff.diffusion.objective import joint_elbo, masked_nll
from unidiff.diffusion.process import NoisyBatch, mask_tokens
from unidiff.models.trained_on import TASKS
from unidiff.models.transformer import MaskedTransformer
from unidiff.tokens import Modality, Vocabulary
from unidiff.train.config import ParallelConfig
from unidiff.train.data.batch import TaskBatch
from unidiff.train.ema import EMA
from unidiff.train.optim import Optimisers
from unidiff.train.run.distributed import Parallel, local

TIME_BUCKETS = 5  # of (0, 1], the time of a row being its mask rate
_MEMORY = 0.98  # of the moving average of losses that spikes are measured against


@dataclass(frozen=True)
class TokenNLL:
    """The forward pass of training and validation: -log p(x0 | x_t) at hidden positions, `[B, L]` nats.

    Args:
        chunk: masked positions per call of the head.
        bf16: under autocast.
        flex: masks of packed, padded or doubled rows are FlexAttention's.
    """

    model: MaskedTransformer
    vocabulary: Vocabulary
    chunk: int
    bf16: bool = False
    flex: bool = False

    def __call__(self, noisy: NoisyBatch, clean: TaskBatch) -> Tensor:
        x_t = noisy.batch
        visible = clean.visible or x_t.visibility()
        mask = None if visible is None else visible.flex() if self.flex else visible.dense()
        with torch.autocast(x_t.ids.device.type, torch.bfloat16, enabled=self.bf16):
            # 2. transformer: hidden states of x_t
            hidden = self.model.hidden(
                x_t.ids, x_t.modality, x_t.positions, attention_mask=mask, time=clean.rate.float()
            )  # [B, L, D]
            # 3. NLL at hidden positions only, each through its modality's slice of the head
            return masked_nll(hidden, self.model, noisy.masked, clean.batch, self.vocabulary, self.chunk, clean.weight)


@dataclass
class TrainState:
    """What a step changes, and what it needs to change it.

    Attributes:
        token_nll: of the model whose parameters `optimisers` and `ema` hold.
        parallel: the processes of the run; alone by default.
        step: optimiser steps taken, skipped ones included.
        spike_factor: a loss above this many times `level` is a spike; 0 allows all.
        level: moving average of the losses of steps taken; 0 before the first.
        bad_steps: consecutive steps skipped for a spike, or a loss or gradient that was not finite.
        skipped: all such steps of the run.
    """

    token_nll: TokenNLL
    optimisers: Optimisers
    ema: EMA
    step: int = 0
    bad_steps: int = 0
    skipped: int = 0
    spike_factor: float = 0.0
    level: float = 0.0
    parallel: Parallel = field(default_factory=lambda: Parallel(torch.device("cpu"), ParallelConfig()))

    def __post_init__(self) -> None:
        self.averaged_nll = self.parallel.forward(self.model, self.token_nll)  # its gradients, over processes

    @property
    def model(self) -> MaskedTransformer:
        return self.token_nll.model

    def finite(self) -> bool:
        """Whether weights and averages, of this process, hold neither NaN nor infinity."""
        held = [*self.model.parameters(), *self.ema.average.values()]
        return all(bool(torch.isfinite(local(value.detach())).all()) for value in held)


@dataclass(frozen=True)
class StepReport:
    """Numbers of one step over all processes, on the CPU.

    Attributes:
        loss: the training loss.
        grad_norm: before clipping.
        finite: False when loss or gradient was not, and the step therefore skipped.
        spike: True when the step was skipped for a loss far above the ones before.
        nll: float32 `[tasks, 2]`, summed nats at hidden positions per task and modality.
        hidden: float32 `[tasks, 2]`, how many there were.
        rows: float32 `[tasks]`.
        by_time: float32 `[TIME_BUCKETS, 2]`, summed nats at hidden positions and their number, by mask rate.
    """

    loss: float
    grad_norm: float
    finite: bool
    spike: bool
    nll: Tensor
    hidden: Tensor
    rows: Tensor
    by_time: Tensor

    @property
    def taken(self) -> bool:
        """Whether the weights were changed."""
        return self.finite and not self.spike


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
    by_time = torch.zeros(TIME_BUCKETS, 2, device=device)
    state.optimisers.zero_grad()
    for micro in batches:
        with parallel.accumulating(last=micro is batches[-1]):
            # 1. hide: x_t, with exactly ceil(rate * targets) hidden per row
            noisy = mask_tokens(micro.batch, micro.rate, state.token_nll.vocabulary, micro.noise)
            nll = state.averaged_nll(noisy, micro)  # steps 2 and 3
            # 4. loss: weighted, normalised by the valid targets of the whole step
            terms = joint_elbo(nll, micro.weight, micro.batch, normalizer=normalizer)
            # 5. backward
            terms.total.backward()
        loss += terms.total.detach()
        _add_sums(sums, by_time, nll.detach(), noisy.masked, micro)
    # 6. clip, and refuse to step on numbers that are not finite, or on a spike
    numbers = parallel.sum(torch.cat([loss[None], sums.flatten(), by_time.flatten()]))
    loss, by_time = numbers[0] / parallel.size, numbers[1 + sums.numel() :].view_as(by_time).cpu()
    sums = numbers[1 : 1 + sums.numel()].view_as(sums).cpu()
    norm = state.optimisers.clip()
    state.optimisers.set_rate(rate_factor)
    state.step += 1
    finite = bool(torch.isfinite(loss) & torch.isfinite(norm))
    value, limit = float(loss), state.spike_factor * state.level
    spike = finite and 0 < limit < value
    if finite and not spike:
        # 7. optimiser, 8. moving averages
        state.optimisers.step()
        state.ema.update()
        state.level = _MEMORY * state.level + (1 - _MEMORY) * value if state.level else value
        state.bad_steps = 0
    else:
        state.bad_steps += 1
        state.skipped += 1
    return StepReport(value, float(norm), finite, spike, sums[0], sums[1], sums[2, :, 0], by_time)


def _add_sums(sums: Tensor, by_time: Tensor, nll: Tensor, masked: Tensor, micro: TaskBatch) -> None:
    task, rate = (
        x if x.ndim == 2 else x[:, None].expand_as(nll) for x in (micro.task, micro.rate)
    )  # packed: per token
    bucket = (rate * TIME_BUCKETS).long().clamp(0, TIME_BUCKETS - 1).flatten()  # [B * L]
    for modality in Modality:
        where = (masked & (micro.batch.modality == modality)).flatten()
        nats, count = nll.flatten().float().where(where, 0), where.float()
        sums[0, :, modality].index_add_(0, task.flatten(), nats)
        sums[1, :, modality].index_add_(0, task.flatten(), count)
        by_time.index_add_(0, bucket, torch.stack([nats, count], 1))
    starts = micro.batch.valid & (micro.batch.positions[..., 0] == 0)  # first tokens of samples
    copies = 1 if micro.visible is None else 2  # block diffusion has every sample twice in a row
    sums[2, :, 0].index_add_(0, task.flatten(), starts.flatten().float() / copies)
