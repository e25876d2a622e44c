"""Validation: NELBOs on held-out rows with fixed masks, always in the ELBO's own weights.

The mixture is reused with every task at a uniform rate and ELBO weights, which is the mask-count estimator: n hidden
targets, n uniform on 1..N, weight N / n. Rates follow a low-discrepancy sequence and masks are keyed, so two calls on the
same weights agree exactly and two checkpoints are compared under the same noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from unidiff.diffusion.objective import joint_elbo, masked_nll
from unidiff.diffusion.process import mask_tokens
from unidiff.tokens import Modality
from unidiff.train.config import TASKS, ObjectiveConfig, TaskConfig, TasksConfig
from unidiff.train.source import TokenSource
from unidiff.train.tasks import TaskMixer, keep_fill

VALIDATION_SEED = 20_240_601


@torch.no_grad()
def validate(
    model: nn.Module,
    hidden: Callable[..., Tensor],
    source: TokenSource,
    rows: int,
    draws: int,
    batch_size: int,
    bf16: bool,
    chunk: int = 1024,
) -> dict[str, float]:
    """NELBOs in nats per row (`joint_nelbo`, its `_text` and `_image` parts, `t2i_nelbo`, `caption_nelbo`, `vqa_nelbo`).

    `joint` uses one shared rate over text and image and bounds -log p(text, image); the others are conditional, over
    their targets only. `*_words` leaves the EOS fill beyond the first EOS out. `*_error` is the standard error over rows.

    Args:
        rows, draws: rows scored, and masks per row; `rows` must not exceed the source for each row to count once.
    """
    device = next(model.parameters()).device
    even = TaskConfig(weight=1.0, loss="elbo")
    mixer = TaskMixer(
        source,
        TasksConfig(even, even, even, even if source.has_questions else TaskConfig(), even),
        ObjectiveConfig(),
        VALIDATION_SEED,
    )
    eos = source.vocabulary.specials.get("eos")
    was_training = model.training
    model.eval()
    report: dict[str, float] = {}
    for task in ("joint", "t2i", "caption", *(("vqa",) if source.has_questions else ())):
        parts: list[Tensor] = []
        for first in range(0, rows * draws, batch_size):
            index = torch.arange(first, first + batch_size) % (rows * draws)  # static shapes: the last batch wraps
            micro = mixer.of(index, TASKS.index(task)).to(device)
            noisy = mask_tokens(micro.batch, micro.rate, source.vocabulary, micro.noise)
            x_t = noisy.batch
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                states = hidden(x_t.ids, x_t.modality, x_t.positions, attention_mask=None, time=micro.rate.float())
                nll = masked_nll(states, model.head, noisy.masked, micro.batch, source.vocabulary, chunk)
            terms = joint_elbo(nll, micro.weight, micro.batch)
            words = terms.row_text
            if eos is not None:
                text = micro.batch.ids[:, : source.text_length].cpu()
                every = torch.ones(len(text), dtype=torch.bool)
                keep = keep_fill(text, eos, every, torch.full((len(text),), 1e-9)).to(device)
                words = (nll * micro.weight)[:, : source.text_length].masked_fill(~keep, 0).sum(1)
            real = min(batch_size, rows * draws - first)
            parts.append(torch.stack([terms.row_text, terms.row_image, words])[:, :real].double().cpu())
        text_part, image_part, words_part = torch.cat(parts, 1)  # [rows * draws] each
        total = text_part + image_part
        report[f"{task}_nelbo"] = float(total.mean())
        report[f"{task}_nelbo_error"] = float(total.std() / math.sqrt(total.numel())) if total.numel() > 1 else math.inf
        if task == "joint":
            report["joint_nelbo_text"], report["joint_nelbo_image"] = float(text_part.mean()), float(image_part.mean())
            length = _targets(mixer, source)
            report["joint_nelbo_per_token"] = report["joint_nelbo"] / length
        if task != "t2i" and eos is not None:
            report[f"{task}_nelbo_words"] = float((words_part + image_part).mean())
    model.train(was_training)
    return report


def _targets(mixer: TaskMixer, source: TokenSource) -> int:
    batch = mixer.of(torch.zeros(1, dtype=torch.long), TASKS.index("joint")).batch
    assert int((batch.modality == Modality.TEXT).sum()) == source.text_length
    return int(batch.targets.sum())
