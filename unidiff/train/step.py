"""The training step, one function from clean tokens to updated weights; validation; and what is measured of steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from unidiff.diffusion.likelihood import without_eos_fill
from unidiff.diffusion.objective import joint_elbo, parts_loss, parts_nll
from unidiff.models.experts import balance_loss, expert_loads, recorded_routings
from unidiff.models.trained_on import TASKS
from unidiff.models.transformer import MaskedTransformer
from unidiff.tokens import Modality, Vocabulary
from unidiff.tokens.batch import moved
from unidiff.train.config import ObjectiveConfig, ParallelConfig, TaskConfig, TasksConfig, TrainConfig
from unidiff.train.data.source import TokenSource
from unidiff.train.data.tasks import HiddenBatch, TaskBatch, TaskMixer
from unidiff.train.optim import EMA, Optimisers
from unidiff.train.run.distributed import Parallel, local

TIME_BUCKETS = 5  # of (0, 1], the time of a row being its mask rate
VALIDATION_SEED = 20_240_601
_MEMORY = 0.98  # of the moving average of losses that spikes are measured against


@dataclass(frozen=True)
class TokenNLL:
    """The forward pass of training and validation: -log p(x0 | x_t) at hidden positions, `[B, L]` nats, each through its
    modality's slice of the head."""

    model: MaskedTransformer
    vocabulary: Vocabulary
    chunk: int  # masked positions per call of the head
    bf16: bool = False  # under autocast
    flex: bool = False  # masks of packed, padded or doubled rows are FlexAttention's
    balance: float = 0.0  # weight of the experts' balance loss

    def ready(self, micro: TaskBatch, device: torch.device) -> HiddenBatch:
        """A batch of the host as the step takes it, on the device: one copy."""
        return moved(HiddenBatch.of(micro, self.vocabulary, self.chunk), device)

    def __call__(self, batch: HiddenBatch) -> Tensor:
        with self._autocast(batch):
            return parts_nll(self._hidden(batch), self.model, batch.parts)

    def loss(self, batch: HiddenBatch, normalizer: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sum of weight * NLL over the hidden positions, divided by `normalizer`; and without gradients the NLLs, and where
        there are experts the balance loss and how many tokens each got, float32 `[1 + layers * E]`.

        The balance loss of a batch counts as its targets do among those of the step.
        """
        with self._autocast(batch), recorded_routings(self.model) as routings:
            loss, nll = parts_loss(self._hidden(batch), self.model, batch.parts, batch.clean.weight / normalizer)
        if not routings:
            return loss, nll, loss.new_zeros(0)
        real = batch.noisy.batch.valid.flatten()
        balance = balance_loss(routings, real) * (batch.clean.batch.targets.sum() / normalizer)
        with torch.no_grad():
            router = torch.cat([balance.detach()[None], expert_loads(routings, real).flatten()])
        return loss + self.balance * balance if self.balance else loss, nll, router

    def _autocast(self, batch: HiddenBatch) -> torch.autocast:
        return torch.autocast(batch.clean.weight.device.type, torch.bfloat16, enabled=self.bf16)

    def _hidden(self, batch: HiddenBatch) -> Tensor:
        """Hidden states of x_t, `[B, L, D]`."""
        x_t, visible = batch.noisy.batch, batch.visible
        mask = None if visible is None else visible.flex() if self.flex else visible.dense()
        rate = batch.clean.rate.float()
        return self.model.hidden(x_t.ids, x_t.modality, x_t.positions, mask, rate, **x_t.continuous())


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
    level: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    """Moving average of the losses of steps taken, where these are computed; 0 before the first."""
    parallel: Parallel = field(default_factory=lambda: Parallel(torch.device("cpu"), ParallelConfig()))

    @classmethod
    def of(cls, token_nll: TokenNLL, config: TrainConfig, parallel: Parallel) -> TrainState:
        """A fresh training. Raises ValueError where the device cannot train with the attention kernel."""
        flex, kind = config.attention_kernel == "flex", parallel.device.type
        if flex and kind != "cuda":
            raise ValueError(
                f"attention_kernel = 'flex' on {kind}: torch has no backward pass of FlexAttention there; use "
                "attention_kernel=sdpa"
            )
        model = token_nll.model
        optimisers, ema = Optimisers(model, config.optimiser), EMA(model, config.ema.decay, config.ema.warmup)
        return cls(token_nll, optimisers, ema, spike_factor=config.spike_factor, parallel=parallel)

    def __post_init__(self) -> None:
        self.level = self.level.to(self.parallel.device)
        self.averaged_loss = self.parallel.forward(self.model, self.token_nll.loss)  # its gradients, over processes

    @property
    def model(self) -> MaskedTransformer:
        return self.token_nll.model

    def count(self, report: StepReport) -> None:
        """Keep count of skipped steps, after each."""
        self.bad_steps = 0 if report.taken else self.bad_steps + 1
        self.skipped += not report.taken

    def finite(self) -> bool:
        """Whether weights and averages, of this process, hold neither NaN nor infinity."""
        held = [*self.model.parameters(), *self.ema.average.values()]
        return bool(torch.stack([torch.isfinite(local(value.detach())).all() for value in held]).all())


class StepReport:
    """Numbers of one step over all processes. They stay where they were computed until one is asked for.

    Args:
        numbers: float64, all of them in the order of `_SHAPES`.

    Attributes:
        loss, grad_norm: the latter before clipping.
        finite: False when loss or gradient was not, and the step therefore skipped.
        spike: True when the step was skipped for a loss far above the ones before.
        nll, hidden: `[tasks, 2]`, summed nats at hidden positions per task and modality, and how many there were.
        rows: `[tasks]`. by_time: `[TIME_BUCKETS, 2]`, summed nats at hidden positions and their number, by mask rate.
        balance: the experts' balance loss. loads: `[layers * E]`, tokens of each expert; empty without experts.
    """

    def __init__(self, numbers: Tensor) -> None:
        self.numbers = numbers

    @staticmethod
    def read(reports: Sequence[StepReport]) -> None:
        """Bring the numbers of several steps to the host, which waits once."""
        for report, numbers in zip(reports, torch.stack([r.numbers for r in reports]).cpu(), strict=True):
            report.numbers = numbers

    def _part(self, name: str) -> Tensor:
        self.numbers = self.numbers.cpu()
        sizes = [math.prod(shape) for shape in _SHAPES.values()]
        parts = self.numbers[: sum(sizes)].split(sizes)
        return dict(zip(_SHAPES, parts, strict=True))[name].view(_SHAPES[name])

    loss = property(lambda self: float(self._part("loss")))
    grad_norm = property(lambda self: float(self._part("grad_norm")))
    finite = property(lambda self: bool(self._part("finite")))
    spike = property(lambda self: bool(self._part("spike")))
    nll = property(lambda self: self._part("sums")[0])
    hidden = property(lambda self: self._part("sums")[1])
    rows = property(lambda self: self._part("sums")[2, :, 0])
    by_time = property(lambda self: self._part("by_time"))
    balance = property(lambda self: self._router()[:1].sum())
    loads = property(lambda self: self._router()[1:])

    def _router(self) -> Tensor:
        self.numbers = self.numbers.cpu()
        return self.numbers[sum(math.prod(shape) for shape in _SHAPES.values()) :]

    @property
    def taken(self) -> bool:
        """Whether the weights were changed."""
        return self.finite and not self.spike


_SUMS, _BY_TIME = (3, len(TASKS), 2), (TIME_BUCKETS, 2)  # nll, hidden, rows per (task, modality)
_SHAPES: dict[str, tuple[int, ...]] = {
    "loss": (),
    "sums": _SUMS,
    "by_time": _BY_TIME,
    "grad_norm": (),
    "finite": (),
    "spike": (),
}


def train_step(state: TrainState, batches: Sequence[TaskBatch], rate_factor: float) -> StepReport:
    """One optimiser step over `batches` (more than one accumulate), as if they were a single batch.

    Args:
        state: changed in place; its counts of skipped steps are left to `TrainState.count`.
        batches: equal-shaped mixed-task batches `[B, L]` on the host: this process's rows.
        rate_factor: factor on the peak learning rate.

    The loss is sum of weight * NLL over hidden targets, divided by all valid targets of the step, hidden or not, those of
    all processes: gradients are averaged over processes, so each divides by the global number over how many they are.
    The device decides whether the step is taken, so the host waits for nothing (with optimisers that cannot, once).
    """
    parallel, device = state.parallel, state.parallel.device
    # 1. hide: x_t, with exactly ceil(rate * targets) hidden per row
    ready = [state.token_nll.ready(batch, device) for batch in batches]
    normalizer: Tensor = sum(b.clean.batch.targets.sum() for b in ready)  # type: ignore[assignment]
    if parallel.size > 1:
        normalizer = parallel.sum(normalizer) / parallel.size
    loss, router = torch.zeros((), device=device), torch.zeros((), device=device)
    sums, by_time = torch.zeros(_SUMS, device=device), torch.zeros(_BY_TIME, device=device)
    state.optimisers.zero_grad()
    for micro in ready:
        with parallel.accumulating(last=micro is ready[-1]):
            # 2. transformer, 3. NLL at hidden positions, 4. loss: weighted, normalised by the targets of the whole step
            part, nll, routed = state.averaged_loss(micro, normalizer)
            # 5. backward
            part.backward()
        loss += part.detach()
        router = router + routed
        _add_sums(sums, by_time, nll, micro)
    numbers = parallel.sum(torch.cat([loss[None], sums.flatten(), by_time.flatten(), router])).double()
    value, (numbers, router) = numbers[0] / parallel.size, numbers.tensor_split([len(numbers) - len(router)])
    router[:1] /= parallel.size
    # 6. clip, and refuse to step on numbers that are not finite, or on a spike
    norm = state.optimisers.clip()
    state.optimisers.set_rate(rate_factor)
    finite, limit = torch.isfinite(value) & torch.isfinite(norm), state.spike_factor * state.level
    spike = finite & (limit > 0) & (value > limit)
    taken = finite & ~spike
    # 7. optimiser, 8. moving averages
    state.optimisers.step(taken)
    state.ema.update(taken)
    level = torch.where(state.level > 0, _MEMORY * state.level + (1 - _MEMORY) * value, value)
    state.level = torch.where(taken, level, state.level)
    state.step += 1
    return StepReport(
        torch.cat([value[None], numbers[1:], torch.stack([norm.double(), finite.double(), spike.double()]), router])
    )


def _add_sums(sums: Tensor, by_time: Tensor, nll: Tensor, batch: HiddenBatch) -> None:
    micro, masked = batch.clean, batch.noisy.masked
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
    their targets only, and there are none of captions and answers of a block-causal model. `*_words` does not count the EOS
    fill beyond the first EOS, which the model sees all the same. `*_error` is the standard error over rows.

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
    parts = []
    for task in scored:
        for first in range(0, rows * draws, share * size):
            index = torch.arange(first + rank * share, first + (rank + 1) * share) % (rows * draws)
            scores = _score(token_nll, mixer, index, TASKS.index(task))
            parts.append(parallel.gather(scores) if parallel else scores)
    scores = torch.cat(parts).cpu().view(len(scored), -1, 3)[:, : rows * draws]
    for task, own in zip(scored, scores, strict=True):
        text, image, words = own.T.contiguous()  # [rows * draws] each
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
    eos, device = token_nll.vocabulary.specials.get("eos"), next(token_nll.model.parameters()).device
    micro = mixer.of(index, task)
    kept = micro.batch if eos is None else without_eos_fill(micro.batch, eos)
    hidden = HiddenBatch.of(mixer.ready(micro), token_nll.vocabulary, token_nll.chunk)  # [B, L] or [B, 2 L]
    micro, kept, hidden = moved((micro, kept, hidden), device)
    nll = token_nll(hidden)[:, -micro.batch.shape[1] :]  # [B, L]
    terms, words = (joint_elbo(nll, micro.weight, batch) for batch in (micro.batch, kept))
    return torch.stack([part.double() for part in (terms.row_text, terms.row_image, words.row_text)], dim=1)
