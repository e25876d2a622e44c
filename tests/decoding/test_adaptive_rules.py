"""Adaptive and max-logit caches under every kind of commit rule: rows stay independent and every decode ends."""

from __future__ import annotations

import pytest
import torch

from unidiff.decoding import Guidance, ModalityDecoding, Sampler, SamplerConfig
from unidiff.decoding.cache import AdaptiveCache, MaxLogitCache
from unidiff.models.transformer import MaskedTransformer
from unidiff.tokens import Span, TokenBatch, Vocabulary

VOCABULARY = Vocabulary.unified(11, 7, {"eos": 2})
POLICIES = {
    "adaptive": AdaptiveCache(5, 3, 0.4),
    "adaptive_upstream": AdaptiveCache(5, 3, 0.4, compat="upstream"),
    "max_logit": MaxLogitCache(0.6, 0.2, 4),
    "max_logit_upstream": MaxLogitCache(0.6, 0.2, 4, compat="upstream"),
}
CONFIGS = {
    "threshold": SamplerConfig(
        text=ModalityDecoding(rule="threshold", threshold=0.3, temperature=0.0, block_length=3),
        image=ModalityDecoding(rule="factor", factor=0.8, block_length=4, block_order="checkerboard"),
        guidance=Guidance(2.5),
    ),
    "remask": SamplerConfig(
        text=ModalityDecoding(steps=4, remask="confidence", remask_threshold=0.6, remask_budget=4),
        image=ModalityDecoding(steps=7, rule="ancestral", remask="remdm", remask_cap=0.3, block_length=5),
        guidance=Guidance(2.0, hide="other"),
    ),
    "ancestral": SamplerConfig(
        text=ModalityDecoding(steps=9, rule="ancestral"), image=ModalityDecoding(steps=12, rule="ancestral")
    ),
    "ordered": SamplerConfig(
        text=ModalityDecoding(rule="first_hitting", block_length=2),
        image=ModalityDecoding(steps=6),
        guidance=Guidance(3.0, mode="window", window=(0.2, 0.7)),
        order="text_first",
    ),
}


@pytest.fixture(scope="module")
def model() -> MaskedTransformer:
    torch.manual_seed(9)
    net = MaskedTransformer(VOCABULARY.size, hidden_size=16, num_layers=2, num_heads=2).eval().double()
    for p in net.parameters():
        p.data.normal_(std=0.4)
    return net


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_rows_alone_are_rows_of_the_batch(model, policy, config) -> None:
    text, image = Span.masked_text(5, VOCABULARY), Span.masked_image((3, 3), VOCABULARY)
    rows = [[Span.text([1, 3, 5], True), text, image], [Span.text([4], True), text], [Span.text([7, 8], True), image]]
    batch, sampler = TokenBatch.from_spans(rows), Sampler(model, VOCABULARY, config, policy)
    out = sampler(batch, torch.arange(3))
    assert out.stats.partial_passes > 0
    masks = torch.tensor([VOCABULARY.mask_id, VOCABULARY.image_mask])
    assert not torch.isin(out.batch.ids, masks).any()
    for i, spans in enumerate(rows):
        alone = sampler(TokenBatch.from_spans([spans]), torch.tensor([i]))
        n = alone.batch.shape[1]
        assert torch.equal(alone.batch.ids[0], out.batch.ids[i, :n])
        torch.testing.assert_close(alone.confidence[0], out.confidence[i, :n])
