"""Rows in the layouts that the reference programs give their networks, from ids alone."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from unidiff.families.unidisc import INTERLEAVED_IMAGES, INTERLEAVED_SIDES
from unidiff.tokens import Modality, TokenBatch, Vocabulary


def llada_batch(ids: Tensor, given: Tensor | None = None, attended: Tensor | None = None) -> TokenBatch:
    """Text ids `[B, L]` as a `TokenBatch`.

    Args:
        ids: int64, padding on either side.
        given: bool, known tokens; None for all.
        attended: bool or 0/1, False on padding; None where there is none. Positions count from the first attended
            token (rotary is relative, so this equals counting from the start of the row).
    """
    valid = torch.ones_like(ids, dtype=torch.bool) if attended is None else attended.bool()
    positions = torch.zeros(*ids.shape, 3, dtype=torch.long, device=ids.device)
    positions[..., 0] = (valid.long().cumsum(1) - 1).clamp_min(0)
    known = torch.ones_like(valid) if given is None else given | ~valid
    sample = torch.where(valid, 0, -1)
    return TokenBatch(ids, torch.full_like(ids, int(Modality.TEXT)), known, valid, positions, sample)


def mdlm_batch(ids: Tensor, attended: Tensor | None = None) -> TokenBatch:
    """Text ids `[B, L]` as a `TokenBatch`: all valid, as the network sees padding; unattended positions are given."""
    positions = torch.zeros(*ids.shape, 3, dtype=torch.long, device=ids.device)
    positions[..., 0] = torch.arange(ids.shape[1], device=ids.device)
    modality = torch.full_like(ids, int(Modality.TEXT))
    everywhere = torch.ones_like(ids, dtype=torch.bool)
    given = torch.zeros_like(everywhere) if attended is None else ~attended.bool()
    return TokenBatch(ids, modality, given, everywhere, positions, torch.zeros_like(ids))


def unidisc_batch(
    ids: Tensor, modality: Tensor, attended: Tensor | None = None, sample_ids: Tensor | None = None
) -> TokenBatch:
    """Ids in UniDisc's layouts as a `TokenBatch`. Each run of image tokens is one square image.

    Static: every position is valid, because the network sees padding; positions that are not `attended` are given, so
    they are never targets. Interleaved: with `sample_ids`; positions count from 0 in each sample.

    Args:
        ids, modality: int64 `[B, L]`.
        attended: `[B, L]`, upstream's attention mask (0 on padding); None for all ones.
        sample_ids: int64 `[B, L]`, the packed sample of every token, -1 on padding; None for the static layout.

    Raises:
        ValueError: a run of image tokens that is no square, in the interleaved layout of another side than
            `INTERLEAVED_SIDES`, or more images in a sample than have a vector.
    """
    batch, length = ids.shape
    samples = torch.zeros_like(ids) if sample_ids is None else sample_ids
    valid = samples >= 0
    image = (modality == Modality.IMAGE) & valid
    positions = torch.zeros(batch, length, 3, dtype=torch.long, device=ids.device)
    place = torch.arange(length, device=ids.device).expand_as(ids)
    begins = torch.nn.functional.pad(samples.diff(dim=1) != 0, (1, 0), value=True)
    positions[..., 0] = (place - torch.where(begins, place, 0).cummax(1).values) * valid
    images: dict[tuple[int, int], int] = {}
    for row, start, stop in image_runs(torch.where(image, samples + 1, 0)):
        side = math.isqrt(stop - start)
        if side * side != stop - start:
            raise ValueError(f"row {row} has a run of {stop - start} image tokens; UniDisc images are square grids")
        if sample_ids is not None:
            sample = (row, int(samples[row, start]))
            images[sample] = images.get(sample, 0) + 1
            if side not in INTERLEAVED_SIDES:
                raise ValueError(
                    f"row {row} has an image of {side}x{side} codes; expected a side of {INTERLEAVED_SIDES}"
                )
            if images[sample] > INTERLEAVED_IMAGES:
                raise ValueError(f"a sample of row {row} has more than {INTERLEAVED_IMAGES} images; split it")
        code = torch.arange(stop - start, device=ids.device)
        positions[row, start:stop, 1] = code // side
        positions[row, start:stop, 2] = code % side
    given = ~valid if attended is None else ~(attended.bool() & valid)
    return TokenBatch(ids, modality, given, valid, positions, samples)


def image_runs(image: Tensor) -> list[tuple[int, int, int]]:
    """(row, start, stop) of every run of one non-zero value in int `[B, L]`."""
    edge = torch.nn.functional.pad(image, (1, 1)).diff(dim=1) != 0  # [B, L + 1]: where the value changes
    out = []
    for row, edges in enumerate(edge):
        bounds = edges.nonzero()[:, 0].tolist()
        out += [(row, a, b) for a, b in pairwise(bounds) if bool(image[row, a])]
    return out


def lumina_batch(ids: Tensor, vocabulary: Vocabulary, valid: Tensor | None = None) -> TokenBatch:
    """Rows as the network sees them: a 1-D sequence in which masked places are image codes and the rest is given.

    Args:
        ids: int64 `[B, L]`, image places masked or filled.
        vocabulary: Lumina's layout (`named_vocabulary("lumina")`).
        valid: bool `[B, L]`, False on padding, which may lie left; None for no padding. Positions count valid tokens.
    """
    valid = torch.ones_like(ids, dtype=torch.bool) if valid is None else valid
    masked = (ids == vocabulary.image_mask) & valid
    start, stop = vocabulary.image
    image = masked | ((ids >= start) & (ids < stop) & valid)
    modality = torch.where(image, int(Modality.IMAGE), int(Modality.TEXT))
    positions = ids.new_zeros(*ids.shape, 3)
    positions[..., 0] = (valid.long().cumsum(1) - 1).clamp_min(0)
    return TokenBatch(ids, modality, ~masked, valid, positions, torch.where(valid, 0, -1))


def lumina_pair(ids: Tensor, prefix: Tensor, code_start: int, vocabulary: Vocabulary) -> tuple[TokenBatch, TokenBatch]:
    """The conditional rows and the unconditional ones of the same image places, for `Sampler(..., unconditional=...)`.

    The unconditional sequence is its own prompt followed by the conditional one from the image's opening ids on
    (answer and image marks, the two ids before `code_start`). Both are right-aligned, so that the image places agree;
    the shorter one gets padding on the left.

    Args:
        ids: int64 `[B, L]`, the conditional sequence. prefix: int64 `[B, P]`, the unconditional prompt.
        code_start: index of the first image code in `ids`.
    """
    tail = ids[:, code_start - 2 :]
    rows = [ids, torch.cat((prefix, tail), dim=1)]
    length = max(row.shape[1] for row in rows)
    batches = []
    for row in rows:
        pad = length - row.shape[1]
        valid = torch.arange(length, device=ids.device) >= pad
        padded = torch.nn.functional.pad(row, (pad, 0))
        batches.append(lumina_batch(padded, vocabulary, valid.expand_as(padded)))
    return batches[0], batches[1]
