"""The training step, one function from clean tokens to updated weights; validation; and what is measured of steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from unidiff.diffusion.likelihood import without_eos_fill
from unidiff.diffusion.noise import NoisyBatch, mask_tokens
from unidiff.diffusion.objective import joint_elbo, masked_nll
from unidiff.models.trained_on import TASKS
from unidiff.models.transformer import MaskedTransformer
from unidiff.tokens import Modality, Vocabulary
from unidiff.train.config import ObjectiveConfig, ParallelConfig, TaskConfig, TasksConfig, TrainConfig
from unidiff.train.cost.plan import TrainingRow, block_causal_pairs, model_size, row_flops
from unidiff.train.data.source import TokenSource
from unidiff.train.data.tasks import TaskBatch, TaskMixer
from unidiff.train.optim import EMA, Optimisers
from unidiff.train.run.distributed import Parallel, local

TIME_BUCKETS = 5  # of (0, 1], the time of a row being its mask rate
VALIDATION_SEED = 20_240_601
_MEMORY = 0.98  # of the moving average of losses that spikes are measured against


@dataclass(frozen=True)
class TokenNLL:
    """The forward pass of training and validation: -log p(x0 | x_t) at hidden positions, `[B, L]` nats."""

    model: MaskedTransformer
    vocabulary: Vocabulary
    chunk: int  # masked positions per call of the head
    bf16: bool = False  # under autocast
    flex: bool = False  # masks of packed, padded or doubled rows are FlexAttention's

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
    """What a step changes, and what it needs to change it."""

    token_nll: TokenNLL  # of the model whose parameters `optimisers` and `ema` hold
    optimisers: Optimisers
    ema: EMA
    step: int = 0  # optimiser steps taken, skipped ones included
    samples: int = 0  # position in the data, from which all noise is keyed
    bad_steps: int = 0  # consecutive steps skipped for a spike, or a loss or gradient that was not finite
    skipped: int = 0  # all such steps of the run
    spike_factor: float = 0.0  # a loss above this many times `level` is a spike; 0 allows all
    level: float = 0.0  # moving average of the losses of steps taken; 0 before the first
    parallel: Parallel = field(default_factory=lambda: Parallel(torch.device("cpu"), ParallelConfig()))

    @classmethod
    def of(
        cls, model: MaskedTransformer, vocabulary: Vocabulary, config: TrainConfig, parallel: Parallel
    ) -> TrainState:
        """A fresh training. Raises ValueError where the device cannot train with the attention kernel."""
        flex, kind = config.attention_kernel == "flex", parallel.device.type
        if flex and kind != "cuda":
            raise ValueError(
                f"attention_kernel = 'flex' on {kind}: torch has no backward pass of FlexAttention there; use "
                "attention_kernel=sdpa"
            )
        token_nll = TokenNLL(model, vocabulary, config.objective.chunk, config.precision == "bf16", flex)
        optimisers, ema = Optimisers(model, config.optimiser), EMA(model, config.ema.decay, config.ema.warmup)
        return cls(token_nll, optimisers, ema, spike_factor=config.spike_factor, parallel=parallel)

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
    """Numbers of one step over all processes, on the CPU; tensors are float32."""

    loss: float
    grad_norm: float  # before clipping
    finite: bool  # False when loss or gradient was not, and the step therefore skipped
    spike: bool  # True when the step was skipped for a loss far above the ones before
    nll: Tensor  # [tasks, 2], summed nats at hidden positions per task and modality
    hidden: Tensor  # [tasks, 2], how many there were
    rows: Tensor  # [tasks]
    by_time: Tensor  # [TIME_BUCKETS, 2], summed nats at hidden positions and their number, by mask rate

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
    # packed rows have them per token
    task, rate = (x if x.ndim == 2 else x[:, None].expand_as(nll) for x in (micro.task, micro.rate))
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


def report_names(source: TokenSource, block_length: int) -> set[str]:
    """Keys of the report of `validate` on these rows; `block_length` is that of a block-causal model, else 0."""
    names = {f"joint_nelbo_{part}" for part in ("text", "image", "per_token")}
    for task in _scored(source, block_length):
        ends = ("", "_error") if task == "text_to_image" else ("", "_error", "_words")
        names |= {_named(task) + end for end in ends}
    return names


def _named(task: str) -> str:
    return "joint_nelbo" if task == "generate" else f"{task}_nelbo"


def _scored(source: TokenSource, block_length: int) -> tuple[str, ...]:
    """Tasks; where a picture comes after the words about it, as in a block-causal model, nothing can be said of those."""
    seeing = () if block_length else ("caption", *(("answer",) if source.has_questions else ()))
    return ("generate", "text_to_image", *seeing)


@torch.no_grad()
def validate(
    token_nll: TokenNLL, source: TokenSource, rows: int, draws: int, batch_size: int, parallel: Parallel | None = None
) -> dict[str, float]:
    """NELBOs in nats per row: `joint_nelbo`, its `_text` and `_image` parts, and of the tasks `text_to_image_nelbo`,
    `caption_nelbo`, `answer_nelbo`; on held-out rows with fixed masks, always in the ELBO's own weights.

    The mixture is reused with every task at a uniform rate and ELBO weights, which is the mask-count estimator: n hidden
    targets, n uniform on 1..N, weight N / n. Rates follow a low-discrepancy sequence and masks are keyed, so two calls on
    the same weights agree exactly and two checkpoints are compared under the same noise. A block-causal model is scored as
    it is trained: every block by its own rate, given clean blocks before it.

    `joint_nelbo` uses one shared rate over text and image and bounds -log p(text, image); the others are conditional, over
    their targets only, and there are none of captions and answers of a block-causal model. `*_words` leaves the EOS fill
    beyond the first EOS out. `*_error` is the standard error over rows.

    Args:
        rows, draws: rows scored, and masks per row; `rows` must not exceed the source for each row to count once.
        batch_size: rows per forward; the last batch wraps round, so that only one shape occurs.
        parallel: processes that share the rows; all must call this, and all get the report.
    """
    rank, size = (parallel.rank, parallel.size) if parallel else (0, 1)
    share = -(-batch_size // size)  # rows per forward of one process
    model, block = token_nll.model, token_nll.model.settings.block_length or 0
    scored, even = _scored(source, block), TaskConfig(weight=1.0, loss="elbo")
    tasks = TasksConfig(**{task: even if task in (*scored, "text") else TaskConfig() for task in TASKS})
    mixer = TaskMixer(source, tasks, ObjectiveConfig(), VALIDATION_SEED, block_length=block)
    was_training = model.training
    model.eval()
    report: dict[str, float] = {}
    for task in scored:
        parts = []
        for first in range(0, rows * draws, share * size):
            index = torch.arange(first + rank * share, first + (rank + 1) * share) % (rows * draws)
            scores = _score(token_nll, mixer, index, TASKS.index(task))
            parts.append(parallel.gather(scores) if parallel else scores)
        text, image, words = torch.cat(parts)[: rows * draws].T.contiguous().cpu()  # [rows * draws] each
        total, name = text + image, _named(task)
        report[name] = float(total.mean())
        report[f"{name}_error"] = float(total.std() / math.sqrt(total.numel())) if total.numel() > 1 else math.inf
        if task == "generate":
            targets = mixer.of(torch.zeros(1, dtype=torch.long), TASKS.index(task)).batch.targets
            report |= {f"{name}_text": float(text.mean()), f"{name}_image": float(image.mean())}
            report[f"{name}_per_token"] = report[name] / int(targets.sum())
        if task != "text_to_image":
            report[f"{name}_words"] = float((words + image).mean())
    model.train(was_training)
    return report


def _score(token_nll: TokenNLL, mixer: TaskMixer, index: Tensor, task: int) -> Tensor:
    """float64 nats `[rows, 3]`: text part, image part, and the text part up to the first EOS."""
    vocabulary, device = token_nll.vocabulary, next(token_nll.model.parameters()).device
    micro = mixer.of(index, task)
    scored = mixer.ready(micro).to(device)  # [B, L] or [B, 2 L]
    noisy = mask_tokens(scored.batch, scored.rate, vocabulary, scored.noise)
    micro = micro.to(device)
    nll = token_nll(noisy, scored)[:, -micro.batch.shape[1] :]  # [B, L]
    eos = vocabulary.specials.get("eos")
    kept = micro.batch if eos is None else without_eos_fill(micro.batch, eos)
    terms, words = (joint_elbo(nll, micro.weight, batch) for batch in (micro.batch, kept))
    return torch.stack([part.double() for part in (terms.row_text, terms.row_image, words.row_text)], dim=1)


class TaskMeter:
    """Sums step reports between two log lines; per task and modality apart."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._steps = 0

    def add(self, report: StepReport) -> None:
        if report.taken:
            self._steps += 1
            for name in ("loss", "grad_norm", "nll", "hidden", "rows", "by_time"):
                value = torch.as_tensor(getattr(report, name), dtype=torch.float64)
                self._sums[name] = self._sums.get(name, 0.0) + value

    def take(self) -> dict[str, float]:
        """Means since the last call: `loss`, `grad_norm`, `share/<task>`, and nats per hidden token:
        `nll/<task>/<modality>`, and `nll_at/<from>-<to>` by mask rate."""
        if not self._steps:
            return {}
        sums, out = self._sums, {name: float(self._sums[name]) / self._steps for name in ("loss", "grad_norm")}
        for number, task in enumerate(TASKS):
            if sums["rows"][number] > 0:
                out[f"share/{task}"] = float(sums["rows"][number] / sums["rows"].sum())
            for column, modality in enumerate(("text", "image")):
                if (count := float(sums["hidden"][number, column])) > 0:
                    out[f"nll/{task}/{modality}"] = float(sums["nll"][number, column]) / count
        for number, (nll, count) in enumerate(sums["by_time"].tolist()):
            if count > 0:
                out[f"nll_at/{number / TIME_BUCKETS:.1f}-{(number + 1) / TIME_BUCKETS:.1f}"] = nll / count
        self._sums, self._steps = {}, 0
        return out


class SpeedMeter:
    """How fast a run of so many processes goes between two log lines, and what it waits for."""

    def __init__(self, config: TrainConfig, source: TokenSource, processes: int) -> None:
        text, image = source.text_length, source.grid[0] * source.grid[1]
        vocabulary, size = source.vocabulary, model_size(config.model, source.vocabulary.size)
        block = config.model.get("block_length")
        pairs = block_causal_pairs(text + image, block) if block else None
        row = TrainingRow(text, image, vocabulary.text_size, vocabulary.image_size, 0.0, pairs)
        self._row_flops = row_flops(size, row).total  # without the head, whose share the masks decide
        self._token_flops = tuple(6.0 * size.hidden_size * n for n in (vocabulary.text_size, vocabulary.image_size))
        self._tokens, self._rows = config.rows_per_step * (text + image), config.rows_per_step
        self._peak = config.logging.peak_tflops * 1e12 * processes
        self._reset()

    def _reset(self) -> None:
        self._seconds, self._waited, self._done = 0.0, 0.0, 0  # the last in tokens
        self._scored = torch.zeros(2, dtype=torch.float64)

    def add(self, report: StepReport, seconds: float, waited: float, tokens: int | None = None) -> None:
        """A step that took `seconds`, `waited` of them for its data.

        Args:
            tokens: of the step, over all processes, where rows have other lengths than pairs; attention is then counted as in
                as many tokens of pairs.
        """
        self._done += self._tokens if tokens is None else tokens
        self._seconds, self._waited = self._seconds + seconds, self._waited + waited
        self._scored += report.hidden.double().sum(0)

    def take(self) -> dict[str, float]:
        """Since the last call: `tokens_per_second`; `data_wait`, the share of time without data; `tflops`, useful
        10^12 operations per second of all processes; `mfu`, their share of the peak where `logging.peak_tflops` says it."""
        if not self._done:
            return {}
        scored = sum(n * f for n, f in zip(self._scored.tolist(), self._token_flops, strict=True))
        flops = (self._done / self._tokens * self._rows * self._row_flops + scored) / self._seconds
        out = {"tokens_per_second": self._done / self._seconds, "tflops": flops / 1e12}
        out["data_wait"] = self._waited / self._seconds
        if self._peak:
            out["mfu"] = flops / self._peak
        self._reset()
        return out
