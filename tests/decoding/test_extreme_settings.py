"""Random settings out to the ends of their ranges: every decode ends, within its passes, alone as in a batch."""

from __future__ import annotations

from random import Random

import pytest
import torch
from cache_cases import VOCABULARY, make_model

from unidiff.decoding import Guidance, ModalityDecoding, Sampler, SamplerConfig, SamplerOutput
from unidiff.decoding.config import (
    BLOCK_ORDERS,
    CONFIDENCES,
    GUIDANCE_MODES,
    HIDES,
    ORDERS,
    REMASKING,
    RULES,
)
from unidiff.diffusion.schedules import SCHEDULES
from unidiff.tokens import Modality, Span, TokenBatch

CHOICES: dict[str, list] = {
    "steps": [1, 2, 3, 7, 12, 40],
    "rule": list(RULES),
    "schedule": ["fixed", *SCHEDULES],
    "confidence": list(CONFIDENCES),
    "temperature": [0.0, 5e-324, 1e-308, 1e-30, 0.3, 1.0, 50.0, 1e300, 1.7e308],
    "choice_temperature": [0, 1e-308, 1.0, 1e30],
    "top_k": [None, 1, 3, 2**62],
    "top_p": [None, 5e-324, 0.5, 1 - 2**-53, 1.0],
    "threshold": [-1e308, 0, 0.5, 0.9, 1, 2, 1e308],
    "factor": [0, 0.5, 1, 1e308],
    "low_threshold": [-5, 0.3, 1e308],
    "credit_decay": [0, 0.8, 1],
    "credit_power": [0, 0.2, 1e30],
    "credit_weight": [0, 0.7, 1e6],
    "block_length": [None, 1, 2, 3, 5, 2**62],
    "block_order": list(BLOCK_ORDERS),
    "blocks_in_flight": [1, 1, 2, 2**62],
    "flight_share": [0, 0.5, 1],
    "flight_threshold": [-1, 0.3, 5],
    "remask": list(REMASKING),
    "remask_threshold": [0, 0.5, 1],
    "remask_budget": [0, 1, 5],
    "remask_cap": [0, 0.4, 1],
    "forbid": [(), (0, 12)],
}


def any_modality(draw: Random) -> ModalityDecoding:
    """Settings that go together."""
    while True:
        try:
            return ModalityDecoding(**{name: draw.choice(values) for name, values in CHOICES.items()})
        except ValueError:
            continue


def any_config(draw: Random) -> SamplerConfig:
    guidance = Guidance(draw.choice([0, 1, 1, 2.0, 1e6]), draw.choice(GUIDANCE_MODES), (0.2, 0.7), draw.choice(HIDES))
    return SamplerConfig(
        any_modality(draw), any_modality(draw), guidance, draw.choice(ORDERS), stop_at_eos=draw.random() < 0.5
    )


def any_row(draw: Random) -> list[Span]:
    spans = [Span.text([4], True)]
    if draw.random() < 0.8:
        spans.append(Span.masked_text(draw.randint(1, 9), VOCABULARY))
    if draw.random() < 0.6:
        spans.append(Span.masked_image((draw.randint(1, 4), draw.randint(1, 4)), VOCABULARY))
    if draw.random() < 0.3:
        spans.append(Span.text([5, 6], True))
    if draw.random() < 0.3:
        spans.append(Span.masked_text(draw.randint(1, 3), VOCABULARY))
    return spans


def check_passes(out: SamplerOutput, config: SamplerConfig) -> None:
    """No row makes more passes than its settings say, and a quota exactly as many."""
    hidden = torch.stack([ids == VOCABULARY.mask_id for ids in out.trajectory])
    written = hidden[:-1] & ~hidden[1:]  # [passes, B, L]
    for modality, decoding in ((Modality.TEXT, config.text), (Modality.IMAGE, config.image)):
        wanted = out.batch.targets & (out.batch.modality == modality)
        for made, targets in zip((written & wanted).any(2).sum(0).tolist(), wanted.sum(1).tolist(), strict=True):
            blocks = -(-targets // min(decoding.block_length or targets, targets)) if targets else 0
            planned = max(decoding.steps, blocks) if targets else 0
            most = {"quota": min(planned, targets), "ancestral": planned}.get(decoding.rule, targets)
            shorter = decoding.block_order == "aligned"  # the first block may be, and there is one more
            assert made <= most + shorter + (decoding.remask_budget if decoding.remask == "confidence" else 0)
            early = modality == Modality.TEXT and config.stop_at_eos
            if decoding.rule == "quota" and decoding.remask == "none" and decoding.blocks_in_flight == 1 and not early:
                assert most <= made <= most + shorter


@pytest.mark.parametrize("cases", [20, pytest.param(1000, marks=pytest.mark.slow)])
def test_extreme_settings_decode_and_rows_keep_to_themselves(cases: int) -> None:
    """Seed 1. In float64, where no decision is within rounding."""
    model, draw = make_model(), Random(1)
    for case in range(cases):
        config, rows = any_config(draw), [any_row(draw) for _ in range(draw.randint(1, 3))]
        batch, seeds = TokenBatch.from_spans(rows), torch.arange(len(rows)) + case
        sampler = Sampler(model, VOCABULARY, config)
        out = sampler(batch, seeds, record=True)
        assert not (out.batch.ids == VOCABULARY.mask_id)[batch.targets].any()
        assert torch.equal(out.batch.ids[~batch.targets], batch.ids[~batch.targets])
        assert ((out.confidence >= 0) & (out.confidence <= 1)).all()
        check_passes(out, config)
        for b, row in enumerate(rows if len(rows) > 1 else ()):
            alone = sampler(TokenBatch.from_spans([row]), seeds[b : b + 1]).batch.ids[0]
            assert torch.equal(alone, out.batch.ids[b, : len(alone)]), (case, b, config)
