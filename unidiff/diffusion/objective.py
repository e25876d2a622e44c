"""The training objective: cross-entropy at masked positions only, weighted into the joint NELBO.

    NELBO = int_0^1 -alpha'_t / (1 - alpha_t) E[ sum over masked i of -log p(x_i | x_t) ] dt

With one t shared by all tokens of a row and modality weights of 1 this bounds -log p(text, image). Restricting the
targets (the rest given) makes it a conditional NELBO. Independent times per modality or other weights are other
objectives: name them so in logs. No `[B, L, V]` tensor is ever made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from unidiff.diffusion.streamed_nll import HeadPart, LinearHead, streamed_loss, streamed_nll
from unidiff.tokens import Modality, TokenBatch, Vocabulary

Head = Callable[[Tensor, int, int], Tensor]  # (hidden [n, D], start, stop) -> logits [n, stop - start]


_WIDTHS = 8  # of chunks, at most


def gather_masked(masked: Tensor, x0: TokenBatch, vocabulary: Vocabulary, modality: Modality, count: int) -> HeadPart:
    """The positions of `masked` (bool `[B, L]`) with that modality, in nearly equal chunks of at most `count`; none is dropped.

    The host waits for the device of `masked`; on the CPU it waits for nothing.

    Raises:
        ValueError: a target lies outside the modality's ids, or `count` is below 1.
    """
    if count < 1:
        raise ValueError(f"gather count is {count}; expected at least 1")
    start, stop = vocabulary.range_of(modality)
    index = (masked & (x0.modality == modality)).reshape(-1).nonzero()[:, 0]  # [n]
    chunks, unit = -(-len(index) // count), -(-count // _WIDTHS)
    width = min(count, -(-len(index) // max(1, chunks * unit)) * unit)
    slot = F.pad(index, (0, chunks * width - len(index)), value=masked.numel()).view(chunks, width)
    real = slot < masked.numel()
    index = slot.masked_fill(~real, 0)
    target = torch.where(real, x0.ids.reshape(-1)[index] - start, 0)
    if chunks and bool(((target < 0) | (target >= stop - start)).any()):
        raise ValueError(f"a masked {modality.name.lower()} target lies outside ids [{start}, {stop}); check the batch")
    return HeadPart(index, slot, target, real, start, stop, tuple(vocabulary.forbidden(modality)))


def head_parts(masked: Tensor, x0: TokenBatch, vocabulary: Vocabulary, count: int) -> tuple[HeadPart, ...]:
    """All positions of `masked`, as `gather_masked` gives those of a modality; none where a modality has none."""
    parts = (gather_masked(masked, x0, vocabulary, modality, count) for modality in Modality)
    return tuple(part for part in parts if len(part.index))


def masked_nll(
    hidden: Tensor, head: Head | LinearHead, masked: Tensor, x0: TokenBatch, vocabulary: Vocabulary, count: int = 512
) -> Tensor:
    """-log p(x0_i | x_t) at masked positions, each through its modality's slice of the head (SUBS by slicing).

    Args:
        hidden: `[B, L, D]` final hidden states of x_t.
        head: the model itself where its head is one matrix (`LinearHead`): logits are made tile by tile and made again
            in the backward pass, so training holds no `[n, V]`. Or any `(hidden [n, D], start, stop) -> logits
            [n, stop - start]`, for instance `model.head`, whose logits autograd keeps.
        masked: bool `[B, L]`. x0: the clean batch.
        count: positions per head call, at most; one of eight sizes.

    Returns:
        `[B, L]` nats, float32 (float64 if the logits are), 0 where not masked.
    """
    return parts_nll(hidden, head, head_parts(masked, x0, vocabulary, count))


def parts_nll(hidden: Tensor, head: Head | LinearHead, parts: Sequence[HeadPart]) -> Tensor:
    """`masked_nll` at positions that are gathered already, for instance on the host."""
    flat = hidden.reshape(-1, hidden.shape[-1])  # [N, D]
    if isinstance(head, LinearHead):
        nll = streamed_nll(flat, *head.head_parameters(), parts)
    else:
        chunks = [
            _chunk_nll(head(flat[index], part.start, part.stop), target, part.forbidden)
            for part in parts
            for index, target in zip(part.index, part.target, strict=True)
        ]
        nll = torch.cat(chunks) if chunks else flat[:0].float().sum(1)  # no numbers, but a part of the graph
    return _placed(nll, parts, hidden.shape[:-1])


def parts_loss(hidden: Tensor, head: LinearHead, parts: Sequence[HeadPart], scale: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of scale * NLL over gathered positions, and the NLLs `[B, L]` of `parts_nll`, without gradients.

    A third faster than the loss of `parts_nll`, whose logits are made twice.

    Args:
        scale: `[B, L]`.
    """
    flat, padded = hidden.reshape(-1, hidden.shape[-1]), F.pad(scale.reshape(-1), (0, 1))
    loss, nll = streamed_loss(flat, *head.head_parameters(), parts, [padded[part.slot] for part in parts])
    return loss, _placed(nll, parts, scale.shape)


def _placed(nll: Tensor, parts: Sequence[HeadPart], shape: torch.Size) -> Tensor:
    """Flat results of parts at their places `[B, L]`; padding goes to a slot that is cut off."""
    slots = [part.slot.reshape(-1) for part in parts]
    slot = torch.cat(slots) if slots else nll.new_zeros(0, dtype=torch.long)
    return nll.new_zeros(shape.numel() + 1).scatter(0, slot, nll)[:-1].view(shape)


def _chunk_nll(logits: Tensor, target: Tensor, forbidden: tuple[int, ...]) -> Tensor:
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if forbidden:
        logits = logits.index_fill(-1, torch.tensor(forbidden, device=logits.device), -torch.inf)
    return F.cross_entropy(logits, target, reduction="none")


@dataclass(frozen=True)
class ElboTerms:
    """Weighted NLL sums and their normalisers.

    Attributes:
        total: scalar to minimise: modality-weighted nats per target token.
        text, image: scalars, nats per target token of that modality, without modality weights; 0 without targets.
        row_text, row_image: `[B]`, nats of each row; their sum is the one-sample NELBO estimate where weights were the ELBO's.
        count_text, count_image: `[B]`, target positions of each row, masked or not.
    """

    total: Tensor
    text: Tensor
    image: Tensor
    row_text: Tensor
    row_image: Tensor
    count_text: Tensor
    count_image: Tensor


def joint_elbo(
    nll: Tensor,
    weight: Tensor,
    batch: TokenBatch,
    modality_weights: Mapping[Modality, float] | None = None,
    normalizer: Tensor | float | None = None,
) -> ElboTerms:
    """Weight per-token NLLs into the NELBO and normalise by valid target positions, masked or not.

    Args:
        nll: `[B, L]`, 0 where not masked. batch: clean or noisy; its `targets` are what is counted.
        weight: `[B]` or `[B, L]`, for instance `Schedule.weight` at the times of the rows.
        modality_weights: default 1 for both, which is the joint NELBO.
        normalizer: divides the total in place of the number of targets: a global count divided by the number of
            ranks where gradients are averaged over ranks, or the number of masked positions for MMaDA's mean.
    """
    weights = {Modality.TEXT: 1.0, Modality.IMAGE: 1.0, **(modality_weights or {})}
    weighted = nll * (weight[:, None] if weight.ndim == 1 else weight)
    rows, counts, means = [], [], []
    for modality in Modality:
        where = batch.targets & (batch.modality == modality)
        rows.append(torch.where(where, weighted, 0).sum(1))
        counts.append(where.sum(1))
        means.append(rows[-1].sum() / counts[-1].sum().clamp_min(1))
    if normalizer is None:
        normalizer = (counts[0] + counts[1]).sum().clamp_min(1)
    total = (weights[Modality.TEXT] * rows[0].sum() + weights[Modality.IMAGE] * rows[1].sum()) / normalizer
    return ElboTerms(total, means[0], means[1], rows[0], rows[1], counts[0], counts[1])
