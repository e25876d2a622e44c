"""The training objective: cross-entropy at masked positions only, weighted into the joint NELBO.

    NELBO = int_0^1 -alpha'_t / (1 - alpha_t) E[ sum over masked i of -log p(x_i | x_t) ] dt

With one t shared by all tokens of a row and modality weights of 1 this bounds -log p(text, image). Restricting the
targets (the rest given) makes it a conditional NELBO. Independent times per modality or other weights are other
objectives: name them so in logs. No `[B, L, V]` tensor is ever made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from unidiff.diffusion.streamed_nll import HeadPart, LinearHead, streamed_nll
from unidiff.tokens import Modality, TokenBatch, Vocabulary

Head = Callable[[Tensor, int, int], Tensor]  # (hidden [n, D], start, stop) -> logits [n, stop - start]


@dataclass(frozen=True)
class MaskedIndex:
    """Masked positions in chunks of one fixed size, because varying matmul sizes leak memory in bf16 on CPU.

    Attributes:
        index: int64 `[chunks, count]`, flat positions in B*L; padding points at position 0.
        slot: int64 `[chunks, count]`, the same with padding pointing at B*L, a place to throw results away.
        target: int64 `[chunks, count]`, the clean ids.
        real: bool `[chunks, count]`, False on padding.
    """

    index: Tensor
    slot: Tensor
    target: Tensor
    real: Tensor


def gather_masked(masked: Tensor, x0: Tensor, count: int) -> MaskedIndex:
    """Index the True positions of `masked` (bool `[B, L]`) and their clean ids, in as many chunks of `count` as needed.

    Nothing is dropped: more masked positions than `count` give more chunks.
    """
    if count < 1:
        raise ValueError(f"gather count is {count}; expected at least 1")
    index = masked.reshape(-1).nonzero()[:, 0]  # [n]
    chunks = -(-len(index) // count)
    slot = F.pad(index, (0, chunks * count - len(index)), value=masked.numel()).view(chunks, count)
    real = slot < masked.numel()
    index = slot.masked_fill(~real, 0)
    return MaskedIndex(index, slot, x0.reshape(-1)[index], real)


def masked_nll(
    hidden: Tensor,
    head: Head | LinearHead,
    masked: Tensor,
    x0: TokenBatch,
    vocabulary: Vocabulary,
    count: int = 512,
    weight: Tensor | None = None,
) -> Tensor:
    """-log p(x0_i | x_t) at masked positions, each through its modality's slice of the head (SUBS by slicing).

    Args:
        hidden: `[B, L, D]` final hidden states of x_t.
        head: the model itself where its head is one matrix (`LinearHead`): logits are made tile by tile and made again
            in the backward pass, so training holds no `[n, V]`. Or any `(hidden [n, D], start, stop) -> logits
            [n, stop - start]`, for instance `model.head`, whose logits autograd keeps.
        masked: bool `[B, L]`.
        x0: the clean batch.
        count: positions per head call; the only matmul size that occurs.
        weight: `[B, L]`, what the loss will multiply each NLL with, up to one common factor. A `LinearHead` then trains a
            third faster; results do not depend on it.

    Returns:
        `[B, L]` nats, float32 (float64 if the logits are), 0 where not masked.

    Raises:
        ValueError: a masked target lies outside its modality's id range.
    """
    gathered = {m: gather_masked(masked & (x0.modality == m), x0.ids, count) for m in Modality}
    used = {m: found for m, found in gathered.items() if len(found.index)}
    parts = tuple(
        HeadPart(
            g.index, _slice_targets(g, vocabulary, m), g.real, *vocabulary.range_of(m), tuple(vocabulary.forbidden(m))
        )
        for m, g in used.items()
    )
    flat = hidden.reshape(-1, hidden.shape[-1])  # [B*L, D]
    if isinstance(head, LinearHead):
        nll = streamed_nll(flat, *head.head_parameters(), parts, None if weight is None else weight.reshape(-1))
    else:
        chunks = [
            _chunk_nll(head(flat[index], part.start, part.stop), target, part.forbidden)
            for part in parts
            for index, target in zip(part.index, part.target, strict=True)
        ]
        nll = torch.cat(chunks) if chunks else flat[:0].float().sum(1)  # no numbers, but a part of the graph
    # back to their places; padding goes to a slot that is cut off
    slots = [g.slot.reshape(-1) for g in used.values()]
    slot = torch.cat(slots) if slots else nll.new_zeros(0, dtype=torch.long)
    return nll.new_zeros(masked.numel() + 1).scatter(0, slot, nll)[:-1].view(masked.shape)


def _slice_targets(gathered: MaskedIndex, vocabulary: Vocabulary, modality: Modality) -> Tensor:
    """Targets counted from the start of the modality's ids, `[chunks, count]`, 0 on padding."""
    start, stop = vocabulary.range_of(modality)
    target = torch.where(gathered.real, gathered.target - start, 0)
    if bool(((target < 0) | (target >= stop - start)).any()):
        raise ValueError(f"a masked {modality.name.lower()} target lies outside ids [{start}, {stop}); check the batch")
    return target


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
        row_text, row_image: `[B]`, nats of each row.
        count_text, count_image: `[B]`, target positions of each row, masked or not.
    """

    total: Tensor
    text: Tensor
    image: Tensor
    row_text: Tensor
    row_image: Tensor
    count_text: Tensor
    count_image: Tensor

    @property
    def row_total(self) -> Tensor:
        """`[B]`, nats of each row over both modalities: the one-sample NELBO estimate when `weight` was the ELBO's."""
        return self.row_text + self.row_image


def joint_elbo(
    nll: Tensor,
    weight: Tensor,
    batch: TokenBatch,
    modality_weights: Mapping[Modality, float] | None = None,
    normalizer: Tensor | float | None = None,
) -> ElboTerms:
    """Weight per-token NLLs into the NELBO and normalise by valid target positions, masked or not.

    Args:
        nll: `[B, L]`, 0 where not masked.
        weight: `[B]` or `[B, L]`, for instance `Schedule.weight` at the times of the rows.
        batch: clean or noisy batch; its `targets` are what is counted.
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
