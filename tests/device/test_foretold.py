"""Rules whose numbers are known beforehand: the passes of a block ask the device for nothing, and decode what they did."""

from __future__ import annotations

import copy
from dataclasses import asdict
from itertools import pairwise

import pytest
import torch
from cache_cases import POLICIES, make_model
from device_cases import plainly
from pass_tape import TapeRecorder
from virtual_device import DEVICE, virtual_device

from unidiff.decoding import Guidance, ModalityDecoding, NoCache, Sampler, SamplerConfig
from unidiff.decoding.cache import BlockCausalCache
from unidiff.tokens import Span, TokenBatch, Vocabulary

ENDLESS = Vocabulary.unified(11, 7)  # without an end of text, which nobody can foretell
RULES = {
    "quota": dict(rule="quota", steps=5, block_length=4),
    "random quota": dict(rule="quota", confidence="random", steps=5, schedule="fixed", block_length=4),
    "ancestral": dict(rule="ancestral", steps=6, schedule="linear", block_length=4),
    "remdm": dict(rule="ancestral", steps=6, remask="remdm", remask_cap=0.4),
    "first_hitting": dict(rule="first_hitting", block_length=4),
}
CACHES = {"none": NoCache, **POLICIES, "block-causal": BlockCausalCache}
ASKING = (
    "max-logit",
    "segments",
    "block-causal",
)  # what these recompute depends on logits, or on where tokens are written


def requests() -> TokenBatch:
    image = Span.masked_image((3, 3), ENDLESS)
    half = Span.image(torch.tensor([[12, 14], [15, 16]]), torch.tensor([[True, False], [False, True]]))
    return TokenBatch.from_packed(
        [
            [[Span.text([3, 1], True), Span.masked_text(6, ENDLESS), image]],
            [[half, Span.masked_text(3, ENDLESS), Span.text([5, 9, 9, 4], True)]],
            [[Span.text([3], True), Span.masked_text(5, ENDLESS)], [half, Span.masked_text(4, ENDLESS)]],
        ]
    )


def outcome(out) -> list:
    cost = {name: value for name, value in asdict(out.stats).items() if name != "forward_seconds"}
    return [out.nfe, out.steps, cost]


def waits_of(model, batch, config, policy, graphs=False) -> list[int]:
    """How often the host waits between two passes of a decode, after checking that it is the CPU's."""
    with plainly():
        expected = Sampler(model, ENDLESS, config, policy())(batch, torch.arange(3), record=True)
    counts: list[int] = []
    with virtual_device() as ledger:
        sampler = Sampler(copy.deepcopy(model).to(DEVICE), ENDLESS, config, policy(), graphs=graphs)
        there, seeds = batch.to(DEVICE), torch.arange(3).to(DEVICE)
        found = sampler(there, seeds, record=True, callback=lambda *_: counts.append(ledger.reads.total()))
        for a, b in zip(expected.trajectory, found.trajectory, strict=True):
            assert torch.equal(a, b.cpu())
        assert torch.equal(expected.confidence, found.confidence.cpu())
    if not graphs:  # these round the sizes of passes up
        assert outcome(expected) == outcome(found)
    return [b - a for a, b in pairwise(counts)]


FAST = {*(("quota", cache) for cache in CACHES), *((rule, cache) for rule in RULES for cache in ("none", "dual"))}
CASES = [
    pytest.param(rule, cache, marks=[] if (rule, cache) in FAST else pytest.mark.slow, id=f"{rule}-{cache}")
    for rule in RULES
    for cache in CACHES
]


@pytest.mark.parametrize(("rule", "cache"), CASES)
def test_passes_ask_once_in_a_block_and_decode_the_same(rule, cache):
    settings = ModalityDecoding(**RULES[rule])
    causal = dict(attention="block_causal", block_length=4) if cache == "block-causal" else {}
    model = make_model(ENDLESS, **causal)
    for guidance, order in ((Guidance(), "together"), (Guidance(2.0, hide="other", mode="ramp"), "text_first")):
        waits = waits_of(model, requests(), SamplerConfig(settings, settings, guidance, order), CACHES[cache])
        if cache in ASKING or (rule == "remdm" and cache != "none"):
            assert set(waits) == {1}
        else:
            assert max(waits) <= 1 and sum(waits) <= (5 if settings.block_length else 0), waits


def test_what_a_callback_changes_is_not_foretold():
    config = SamplerConfig(ModalityDecoding(rule="quota", steps=5), ModalityDecoding(rule="quota", steps=5))
    model, batch, asked = make_model(ENDLESS), requests(), []
    with virtual_device() as ledger:
        there = copy.deepcopy(model).to(DEVICE)

        def change(step, view):
            asked.append(ledger.reads.total())
            return {"ids": view.ids} if step == 1 else step < 3

        out = Sampler(there, ENDLESS, config)(batch.to(DEVICE), torch.arange(3).to(DEVICE), callback=change)
        assert out.steps == 5 and not (out.batch.ids.cpu() == ENDLESS.mask_id).any()
    assert asked[1] == asked[0] and asked[3] > asked[2] > asked[1]


@pytest.mark.parametrize("cache", ["none", "dual", "adaptive"])
def test_recorded_passes_are_repeated_without_the_host(cache):
    tape, settings = TapeRecorder(), ModalityDecoding(rule="quota", steps=16, block_length=9)
    batch = TokenBatch.cat([requests().rows(slice(1))] * 3)
    waits = waits_of(make_model(ENDLESS), batch, SamplerConfig(settings, settings), CACHES[cache], tape)
    assert not any(waits) and tape.repeated >= 2
