"""`first_end`: once an end of text is written, passes are for what stands before it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cache_cases import EOS, POLICIES, VOCABULARY, decode, make_model

from unidiff.decoding import Guidance, ModalityDecoding, SamplerConfig
from unidiff.tokens import Span, TokenBatch

RULES = {
    "quota": dict(steps=12, schedule="fixed"),
    "few passes": dict(steps=5, schedule="linear"),
    "threshold": dict(rule="threshold", threshold=0.3),
    "random": dict(steps=8, confidence="random"),
    "blocks": dict(steps=16, schedule="fixed", block_length=6),
    "in flight": dict(rule="threshold", threshold=0.3, block_length=6, blocks_in_flight=2, flight_threshold=0.2),
}
MASK = VOCABULARY.mask_id


@pytest.fixture(scope="module")
def model():
    """Writes an end of text here and there."""
    made = make_model(head_bias=True)
    with torch.no_grad():
        made.output_bias[EOS] += 1.0
    return made


def rows() -> list[TokenBatch]:
    prompts = ([3, 4], [5, 9, 1, 7], [8], [1, 1, 6])
    return [TokenBatch.from_spans([[Span.text(p, True), Span.masked_text(16, VOCABULARY)]]) for p in prompts]


def settings(rule: str, first: bool) -> SamplerConfig:
    text = ModalityDecoding(temperature=0.7, **RULES[rule])
    return SamplerConfig(text=text, guidance=Guidance(1.5), first_end=first)


@pytest.mark.parametrize("rule", RULES)
def test_nothing_behind_a_written_end_is_decoded(model, rule):
    seeds, batch = [11, 12, 13, 14], TokenBatch.cat(rows())
    out, plain = (decode(model, settings(rule, first), None, batch, seeds) for first in (True, False))
    early = 0
    for row in range(len(seeds)):
        for before, after in zip(out.trajectory, out.trajectory[1:], strict=False):
            own, new = before[row], after[row]
            ends = ((own == EOS) & batch.targets[row]).nonzero()[:, 0]
            if not len(ends):
                continue
            place = torch.arange(len(own))
            written = (own == MASK) & (new != MASK) & batch.targets[row]
            open_before = bool(((own == MASK) & (place < ends[0])).any())
            early += open_before
            behind = written & (place > ends[0])
            assert bool((new[behind] == EOS).all())  # the fill of a finished text
            assert not behind.any() or not ((new == MASK) & (place < ends[0])).any()
    assert early > 0 and out.steps <= plain.steps
    assert not (out.batch.ids[batch.targets] == MASK).any()


@pytest.mark.parametrize("policy", [None, *POLICIES])
def test_rows_of_a_batch_are_the_rows_alone(model, policy):
    made = None if policy is None else POLICIES[policy]()
    together = decode(model, settings("quota", True), made, TokenBatch.cat(rows()), [11, 12, 13, 14])
    for row, own in enumerate(rows()):
        alone = decode(model, settings("quota", True), made, own, [11 + row])
        assert torch.equal(alone.batch.ids[0], together.batch.ids[row, : own.shape[1]])


def test_it_changes_nothing_where_no_end_is_written():
    """Nor in settings that say nothing of it."""
    never = replace(settings("quota", False).text, forbid=(EOS,))
    outs = [
        decode(make_model(), replace(settings("quota", first), text=never), None, TokenBatch.cat(rows()), [1, 2, 3, 4])
        for first in (True, False)
    ]
    assert torch.equal(outs[0].batch.ids, outs[1].batch.ids) and outs[0].steps == outs[1].steps
    assert SamplerConfig.from_dict(settings("quota", True).to_dict()).first_end and not SamplerConfig().first_end
