"""Validation: NELBOs on held-out rows with fixed masks, always in the ELBO's own weights.

The mixture is reused with every task at a uniform rate and ELBO weights, which is the mask-count estimator: n hidden
targets, n uniform on 1..N, weight N / n. Rates follow a low-discrepancy sequence and masks are keyed, so two calls on the
same weights agree exactly and two checkpoints are compared under the same noise. A block-causal model is scored as it is trained:
every block by its own rate, given clean blocks before it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from unidiff.diffusion.likelihood import without_eos_fill
from unidiff.diffusion.noise import mask_tokens
from unidiff.diffusion.objective import joint_elbo
from unidiff.models.trained_on import TASKS
from unidiff.train.config import ObjectiveConfig, TaskConfig, TasksConfig
from unidiff.train.data.source import TokenSource
from unidiff.train.data.tasks import TaskMixer
from unidiff.train.run.distributed import Parallel
from unidiff.train.step import TokenNLL

VALIDATION_SEED = 20_240_601


def report_names(source: TokenSource, block_length: int) -> set[str]:
    """Keys of the report of `validate` on these rows.

    Args:
        block_length: of a block-causal model, else 0.
    """
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
    `caption_nelbo`, `answer_nelbo`.

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
