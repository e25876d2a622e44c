"""SUBS by slicing (MDLM, Sahoo et al. 2024, section 3.2.3): log p(x0 | x_t) over a whole vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

from unidiff.models.denoiser import Denoiser
from unidiff.tokens import Modality, TokenBatch, Vocabulary


def modality_logits(model: Denoiser, hidden: Tensor, modality: Modality | int, vocabulary: Vocabulary) -> Tensor:
    """Logits over one modality's ids, `[..., D]` to float32 `[..., n]`; entry j stands for id `range_of(modality)[0] + j`.

    A [MASK] that lies inside the slice gets -inf.
    """
    logits = model.head(hidden, *vocabulary.range_of(modality))
    if forbidden := vocabulary.forbidden(modality):
        logits = logits.index_fill(-1, torch.tensor(forbidden, device=logits.device), -torch.inf)
    return logits


def subs_log_probs(model: Denoiser, batch: TokenBatch, vocabulary: Vocabulary, time: Tensor | None = None) -> Tensor:
    """log p(x0 | x_t) over the whole vocabulary, `[B, L, V]`, for tests and small vocabularies.

    Masked positions: log-softmax over their modality's ids, -inf elsewhere. Known positions: 0 at their own token,
    -inf elsewhere.
    """
    hidden = model.hidden(batch.ids, batch.modality, batch.positions, batch.attention_mask(), time)
    out: Tensor | None = None
    for modality in Modality:
        start, stop = vocabulary.range_of(modality)
        rows = batch.modality == modality  # [B, L]
        if stop == start or not bool(rows.any()):
            continue
        part = modality_logits(model, hidden[rows], modality, vocabulary).log_softmax(-1)  # [N, n]
        if out is None:
            out = part.new_full((*batch.shape, vocabulary.size), -torch.inf)
        full = part.new_full((len(part), vocabulary.size), -torch.inf)
        full[:, start:stop] = part
        out[rows] = full
    if out is None:
        raise ValueError("the batch holds no token of a modality that the vocabulary can predict")
    masks = torch.where(batch.modality == Modality.IMAGE, vocabulary.image_mask, vocabulary.mask_id)
    known = torch.full_like(out, -torch.inf).scatter(-1, batch.ids[..., None], 0.0)
    return torch.where((batch.ids == masks)[..., None], out, known)
