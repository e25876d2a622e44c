"""A cache per segment: exact where every part refreshes, rows apart, equal to one policy where all parts have it."""

from __future__ import annotations

import pytest
import torch
from cache_cases import EVERY_PASS, POLICIES, VOCABULARY, decode, make_model, rows, rows_alone, same

from unidiff.decoding import Guidance, ModalityDecoding, NoCache, SamplerConfig
from unidiff.decoding.cache import (
    AdaptiveCache,
    BlockCausalCache,
    DualCache,
    HeldGuidance,
    IntervalCache,
    MaxLogitCache,
    ModalityCache,
    SegmentCache,
)
from unidiff.models.transformer import MaskedTransformer
from unidiff.tokens import Span, TokenBatch

CONFIGS = {
    "quota": SamplerConfig(
        text=ModalityDecoding(steps=6, schedule="fixed", block_length=4),
        image=ModalityDecoding(steps=8, block_length=4, block_order="halton"),
        guidance=Guidance(2.0),
    ),
    "remask": SamplerConfig(
        text=ModalityDecoding(steps=4, block_length=4, remask="confidence", remask_threshold=0.6, remask_budget=4),
        image=ModalityDecoding(steps=6, rule="ancestral", remask="remdm", remask_cap=0.3, block_length=5),
        guidance=Guidance(2.0, hide="other"),
    ),
    "ordered": SamplerConfig(
        text=ModalityDecoding(rule="hierarchical", threshold=0.6, low_threshold=0.2, block_length=5, temperature=0.0),
        image=ModalityDecoding(steps=5, confidence="margin"),
        guidance=Guidance(3.0, mode="window", window=(0.2, 0.7)),
        order="text_first",
    ),
    "level": SamplerConfig(
        text=ModalityDecoding(rule="credit", threshold=0.5, block_length=3, blocks_in_flight=2, flight_threshold=0.4),
        image=ModalityDecoding(steps=5, schedule="linear"),
        order="level",
    ),
}


@pytest.fixture(scope="module")
def model() -> MaskedTransformer:
    return make_model()


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS.keys())
def config(request) -> SamplerConfig:
    return request.param


@pytest.mark.parametrize("name", EVERY_PASS)
def test_refreshing_every_pass_is_no_cache(model, config, name):
    batch = TokenBatch.cat(rows())
    plain = decode(model, config, NoCache(), batch, [0, 1, 2])
    cached = decode(model, config, EVERY_PASS[name](), batch, [0, 1, 2])
    same(plain, cached)
    assert cached.nfe <= plain.nfe  # a stream that no row needs is left out


@pytest.mark.parametrize("name", ["interval", "modality", "segments", "segments by layer"])
def test_a_row_in_a_padded_batch_equals_the_row_alone(model, config, name):
    together = rows_alone(model, config, POLICIES[name]())
    assert together.stats.partial_passes > 0


@pytest.mark.parametrize("name", ["interval", "modality", "segments", "segments by layer"])
def test_a_joint_decode_fills_every_target_from_features_that_age(model, config, name):
    """Until a kept feature is used the decode is that without a cache; later it differs and costs less."""
    batch = TokenBatch.cat(rows())
    plain = decode(model, config, NoCache(), batch, [0, 1, 2])
    cached = decode(model, config, POLICIES[name](), batch, [0, 1, 2])
    assert (cached.batch.ids != VOCABULARY.mask_id)[batch.valid].all()
    assert torch.equal(cached.batch.ids[batch.given], batch.ids[batch.given])
    assert cached.stats.model_tokens / cached.nfe < batch.ids.numel()  # whole rows
    first = cached.trajectory[1] != cached.trajectory[0]
    if name != "modality":  # which holds the image back
        assert torch.equal(plain.trajectory[1], cached.trajectory[1])
    wrote = first & (cached.batch.ids == cached.trajectory[1]) & (plain.batch.ids == cached.trajectory[1])
    if config.text.remask == "none":
        torch.testing.assert_close(cached.confidence[wrote], plain.confidence[wrote])
    assert not torch.equal(plain.confidence, cached.confidence)


@pytest.mark.parametrize(
    "make",
    [
        lambda: DualCache(interval=3),
        lambda: DualCache(drift=0.3),
        lambda: IntervalCache(3),
        lambda: AdaptiveCache(prompt_interval=5, response_interval=3, ratio=0.4),
        lambda: MaxLogitCache(0.5, 0.2, 3),
    ],
    ids=["dual", "dual by drift", "interval", "adaptive", "max-logit"],
)
@pytest.mark.parametrize("kind", ["text", "image"])
def test_one_policy_for_all_segments_is_that_policy(model, make, kind):
    """With targets of one modality nothing is left to tell apart."""
    hidden = Span.masked_text(9, VOCABULARY) if kind == "text" else Span.masked_image((3, 3), VOCABULARY)
    picture = Span.image(torch.tensor([[12, 14], [15, 16]]), True)
    batch = TokenBatch.from_spans([[Span.text([3, 1], True), hidden, picture], [Span.text([4], True), hidden]])
    rule = ModalityDecoding(steps=7, schedule="linear", block_length=5)
    config = SamplerConfig(text=rule, image=rule, guidance=Guidance(2.0))
    whole = decode(model, config, make(), batch, [0, 1])
    parts = decode(model, config, SegmentCache(make(), make(), make(), make()), batch, [0, 1])
    same(whole, parts)
    assert whole.nfe == parts.nfe


def test_every_segment_pays_for_its_own_refreshes(model):
    """4 passes: prompt of 3 every 3, text of 4 in every pass, image of 4 by its block of 2 and when one begins."""
    batch = TokenBatch.from_spans(
        [[Span.text([1, 4, 3], True), Span.masked_text(4, VOCABULARY), Span.masked_image((2, 2), VOCABULARY)]]
    )
    config = SamplerConfig(
        text=ModalityDecoding(steps=4, schedule="fixed"),
        image=ModalityDecoding(steps=4, schedule="fixed", block_length=2),
        stop_at_eos=False,
    )
    policy = SegmentCache(text=NoCache(), image=DualCache(), text_prompt=IntervalCache(3))
    out = decode(model, config, policy, batch, [0])
    prompt, text, image = 2 * 3, 4 * 4, 4 + 2 + 4 + 2  # passes 0 and 3; all; a block begins at passes 0 and 2
    assert out.nfe == 4 and out.stats.model_tokens == prompt + text + image


def test_shares_are_taken_within_a_segment():
    """Two positions of a row are less alike than all others; a share of each segment is chosen all the same."""
    batch = TokenBatch.from_spans([[Span.masked_text(4, VOCABULARY), Span.masked_image((2, 2), VOCABULARY)]])
    policy = SegmentCache(AdaptiveCache(ratio=0.5), AdaptiveCache(ratio=0.25), NoCache(), NoCache())
    started = policy.start(batch, make_model())
    alike = torch.tensor([[0.9, 0.8, 0.7, 0.6, 0.1, 0.2, 0.3, 0.4]])
    two_streams = torch.cat([alike, torch.tensor([[0.1, 0.2, 0.9, 0.8, 0.5, 0.6, 0.7, 0.05]])])
    assert started.select(0, two_streams).tolist() == [
        [False, False, True, True, True, False, False, False],
        [True, True, False, False, False, False, False, True],
    ]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SegmentCache(text=BlockCausalCache()), "BlockCausalCache decides for whole rows.*'text'"),
        (lambda: SegmentCache(image=ModalityCache()), "ModalityCache decides for whole rows.*'image'"),
        (lambda: SegmentCache(image_prompt=SegmentCache()), "SegmentCache decides for whole rows.*'image_prompt'"),
        (lambda: SegmentCache(text=HeldGuidance(AdaptiveCache(), 3)), "HeldGuidance decides for whole rows"),
        (lambda: IntervalCache(0), "interval is 0"),
        (lambda: ModalityCache(interval=3, joint=4), "joint is 4, more than the 3 passes"),
        (lambda: ModalityCache(held="sound"), "held is 'sound'"),
    ],
)
def test_settings_that_do_not_fit(make, message):
    with pytest.raises(ValueError, match=message):
        make()
