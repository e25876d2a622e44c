"""Validation: NELBOs on held-out rows with fixed masks, always in the ELBO's own weights.

The mixture is reused with every task at a uniform rate and ELBO weights, which is the mask-count estimator: n hidden
targets, n uniform on 1..N, weight N / n. Rates follow a low-discrepancy sequence and masks are keyed, so two calls on the
same weights agree exactly and two checkpoints are compared under the same noise. A block-causal model is scored as it is trained:
every block by its own rate, given clean blocks before it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from unidiff.diffusion.objective import joint_elbo, masked_nll
from unidiff.diffusion.process import mask_tokens
from unidiff.models.trained_on import TASKS
from unidiff.models.transformer import MaskedTransformer
from unidiff.train.block_diffusion import double_rows
from unidiff.train.config import ObjectiveConfig, TaskConfig, TasksConfig
from unidiff.train.data.source import TokenSource
from unidiff.train.data.tasks import TaskMixer, keep_fill
from unidiff.train.run.distributed import Parallel

VALIDATION_SEED = 20_240_601


def report_names(source: TokenSource, block_length: int) -> set[str]:
    """Keys of the report of `validate` on these rows.

    Args:
        block_length: of a block-causal model, else 0.
    """
    names = {f"joint_nelbo_{part}" for part in ("text", "image", "per_token", "words")}
    seeing = _seeing(source, block_length)
    names |= {f"{_named(task)}{end}" for task in ("generate", "text_to_image", *seeing) for end in ("", "_error")}
    return names | {f"{_named(task)}_words" for task in seeing}


def _named(task: str) -> str:
    return "joint_nelbo" if task == "generate" else f"{task}_nelbo"


def _seeing(source: TokenSource, block_length: int) -> tuple[str, ...]:
    """Tasks whose targets are words about a picture; where the picture comes after its words, nothing can be said of it."""
    return () if block_length else ("caption", *(("answer",) if source.has_questions else ()))


@torch.no_grad()
def validate(
    model: MaskedTransformer,
    hidden: Callable[..., Tensor],
    source: TokenSource,
    rows: int,
    draws: int,
    batch_size: int,
    bf16: bool,
    chunk: int = 1024,
    parallel: Parallel | None = None,
) -> dict[str, float]:
    """NELBOs in nats per row (`joint_nelbo`, its `_text` and `_image` parts, `text_to_image_nelbo`, `caption_nelbo`, `answer_nelbo`).

    `joint_nelbo`, of the task `generate`, uses one shared rate over text and image and bounds -log p(text, image); the others are conditional, over
    their targets only, and there are none of captions and answers of a block-causal model. `*_words` leaves the EOS fill
    beyond the first EOS out. `*_error` is the standard error over rows.

    Args:
        model: its weights are scored as they are, in evaluation mode.
        hidden: `model.hidden`, possibly compiled.
        rows, draws: rows scored, and masks per row; `rows` must not exceed the source for each row to count once.
        batch_size: rows per forward; the last batch wraps round, so that only one shape occurs.
        bf16: under autocast.
        chunk: masked positions per call of the head.
        parallel: processes that share the rows; all must call this, and all get the report.
    """
    rank, size = (parallel.rank, parallel.size) if parallel else (0, 1)
    share = -(-batch_size // size)  # rows per forward of one process
    even, off = TaskConfig(weight=1.0, loss="elbo"), TaskConfig()
    block = model.config.block_length if model.config.attention == "block_causal" else 0
    seeing = _seeing(source, block)
    described, asked = (even if name in seeing else off for name in ("caption", "answer"))
    tasks = TasksConfig(even, even, described, asked, even)
    mixer = TaskMixer(source, tasks, ObjectiveConfig(), VALIDATION_SEED, block_length=block)
    was_training = model.training
    model.eval()
    report: dict[str, float] = {}
    for task in ("generate", "text_to_image", *seeing):
        parts = []
        for first in range(0, rows * draws, share * size):
            index = torch.arange(first + rank * share, first + (rank + 1) * share) % (rows * draws)
            with torch.autocast(next(model.parameters()).device.type, torch.bfloat16, enabled=bf16):
                scores = _score(model, hidden, mixer, index, TASKS.index(task), chunk)
            parts.append(parallel.gather(scores) if parallel else scores)
        text, image, words = torch.cat(parts)[: rows * draws].T.contiguous().cpu()  # [rows * draws] each
        total = text + image
        report[_named(task)] = float(total.mean())
        report[f"{_named(task)}_error"] = (
            float(total.std() / math.sqrt(total.numel())) if total.numel() > 1 else math.inf
        )
        if task == "generate":
            report["joint_nelbo_text"], report["joint_nelbo_image"] = float(text.mean()), float(image.mean())
            report["joint_nelbo_per_token"] = report["joint_nelbo"] / _target_count(mixer)
        if task != "text_to_image":
            report[f"{_named(task)}_words"] = float((words + image).mean())
    model.train(was_training)
    return report


def _score(
    model: MaskedTransformer, hidden: Callable[..., Tensor], mixer: TaskMixer, index: Tensor, task: int, chunk: int
) -> Tensor:
    """float64 nats `[rows, 3]`: text part, image part, and the text part up to the first EOS."""
    source, device = mixer.source, next(model.parameters()).device
    micro = mixer.of(index, task).to(device)
    scored = double_rows(micro, mixer.block_length) if mixer.block_length else micro  # [B, L] or [B, 2 L]
    noisy = mask_tokens(scored.batch, scored.rate, source.vocabulary, scored.noise)
    x_t = noisy.batch
    mask = x_t.attention_mask() if scored.visible is None else scored.visible.dense()
    states = hidden(x_t.ids, x_t.modality, x_t.positions, attention_mask=mask, time=scored.rate.float())
    nll = masked_nll(states, model.head, noisy.masked, scored.batch, source.vocabulary, chunk)
    nll = nll[:, -micro.batch.shape[1] :]  # [B, L]
    terms = joint_elbo(nll, micro.weight, micro.batch)
    words, eos = terms.row_text, source.vocabulary.specials.get("eos")
    if eos is not None:
        text = micro.batch.ids[:, : source.text_length].cpu()
        every, shortest = torch.ones(len(text), dtype=torch.bool), torch.zeros(len(text))
        keep = keep_fill(text, eos, every, shortest).to(device)
        words = (nll * micro.weight)[:, : source.text_length].masked_fill(~keep, 0).sum(1)
    return torch.stack([part.double() for part in (terms.row_text, terms.row_image, words)], dim=1)


def _target_count(mixer: TaskMixer) -> int:
    batch = mixer.of(torch.zeros(1, dtype=torch.long), TASKS.index("generate")).batch
    return int(batch.targets.sum())
