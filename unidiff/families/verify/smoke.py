"""One small fixed question to any model, and what the tiny models of the families answer to it (`Family.tiny`)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from unidiff.families.family import Family
from unidiff.models.mmdit import MMDiT
from unidiff.models.transformer import MaskedTransformer
from unidiff.tokens.batch import Span, TokenBatch
from unidiff.tokens.image.vq import VQImageTokenizer
from unidiff.tokens.vocabulary import Vocabulary
from unidiff.weights.checks import build_on_meta

TEXT_TOKENS, SIDE = 12, 4


@torch.no_grad()
def answer(model: Any, vocabulary: Vocabulary | None) -> Tensor:
    """Float32 values, flat, on the CPU: logits of hidden tokens, or pixels.

    Args:
        model: a `MaskedTransformer`, an `MMDiT`, or an image tokenizer.
        vocabulary: id layout; None for an image tokenizer.
    """
    if isinstance(model, VQImageTokenizer):
        codes = torch.arange(SIDE * SIDE).reshape(1, SIDE, SIDE) * 7 % model.codebook_size
        return model.decode(codes).float().cpu().flatten()
    assert vocabulary is not None
    if isinstance(model, MMDiT):
        return _mmdit(model).float().cpu().flatten()
    assert isinstance(model, MaskedTransformer)
    batch = question(vocabulary).to(model.device)
    c = model.config
    time = torch.full((1,), 0.5, device=model.device) if c.time_conditioning and c.constant_time is None else None
    hidden = model.hidden(batch.ids, batch.modality, batch.positions, batch.attention_mask(), time)
    logits = model.head(hidden[batch.targets], *vocabulary.text)  # [targets, text ids]
    return logits.float().cpu().flatten()


def question(vocabulary: Vocabulary) -> TokenBatch:
    """A row of text, every third token hidden, and where there are codes an image with every other one hidden."""
    start, stop = vocabulary.text
    ids = start + torch.arange(TEXT_TOKENS) * 5 % (stop - start)
    hidden = torch.arange(TEXT_TOKENS) % 3 == 2
    spans = [Span.text(torch.where(hidden, vocabulary.mask_id, ids), ~hidden)]
    if vocabulary.image_size:
        codes = vocabulary.image[0] + torch.arange(SIDE * SIDE).reshape(SIDE, SIDE) * 3 % vocabulary.image_size
        holes = torch.arange(SIDE * SIDE).reshape(SIDE, SIDE) % 2 == 1
        spans.append(Span.image(torch.where(holes, vocabulary.image_mask, codes), ~holes))
    return TokenBatch.from_spans([tuple(spans)])


def _mmdit(model: MMDiT) -> Tensor:
    c, device = model.config, model.device
    codes = torch.arange(SIDE * SIDE, device=device).reshape(1, SIDE, SIDE) * 3 % c.codebook_size
    codes[:, :, 1::2] = c.vocab_size - 1
    width = c.text_dim if c.adapter_dim is None else c.adapter_dim
    text = torch.sin(torch.arange(TEXT_TOKENS * width, device=device).float()).reshape(1, TEXT_TOKENS, width)
    pooled = torch.sin(torch.arange(c.pooled_dim, device=device).float())[None]
    micro = torch.tensor([[512.0, 512.0, 0.0, 0.0, 6.0]], device=device)
    out = model(codes, text.to(model.dtype), pooled.to(model.dtype), micro, torch.tensor([0.5], device=device))
    return out.image if out.text is None else torch.cat((out.image.flatten().float(), out.text.flatten().float()))


def formula_weights(family: Family) -> dict[str, Tensor]:
    """Weights of the tiny model under released names: 0.3 sin(...), and around 1 for vectors."""
    settings = {**family.settings(family.tiny.config), **family.tiny.measured}
    state = family.export(build_on_meta(family.network, settings))
    return {n: v if n in family.constants else _wave(tuple(v.shape), sum(n.encode())) for n, v in state.items()}


def known_answer(family: Family) -> tuple[float, float, float, float]:
    """What the tiny model answers here, through the family's own loader; compare with `family.tiny.answer`."""
    model, vocabulary = family.load(formula_weights(family), family.tiny.config, vocabulary=family.tiny.vocabulary)
    values = answer(model, vocabulary).double()
    return float(values.mean()), float(values.std()), float(values[0]), float(values[-1])


def agrees(found: tuple[float, ...], expected: tuple[float, ...]) -> bool:
    """Within the rounding of float32 on another machine."""
    return all(math.isclose(a, b, rel_tol=1e-3, abs_tol=1e-4) for a, b in zip(found, expected, strict=True))


def _wave(shape: tuple[int, ...], phase: int) -> Tensor:
    index = torch.arange(math.prod(shape), dtype=torch.float64)
    values = torch.sin(0.7 * index + 0.013 * phase).float().reshape(shape)
    return 0.3 * values if len(shape) > 1 else 1 + 0.2 * values
