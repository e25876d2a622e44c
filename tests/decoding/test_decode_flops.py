"""FLOPs by hand, and decodes that cost exactly what the formulas say."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import pytest
import torch

from unidiff.decoding import Guidance, ModalityDecoding, NoCache, Sampler, SamplerConfig
from unidiff.decoding.cache import (
    AdaptiveCache,
    DualCache,
    IntervalCache,
    MaxLogitCache,
    Policy,
    PrefixCache,
    VicinityCache,
)
from unidiff.decoding.cache.base import expected_passes, speedup_bound
from unidiff.decoding.row_decode import RowDecode, RowWork, TokenRun, moments
from unidiff.models.denoiser import LayerWork
from unidiff.models.transformer import MaskedTransformer
from unidiff.tokens import Modality, Span, TokenBatch, Vocabulary

VOCABULARY = Vocabulary.unified(11, 7)
POLICIES = {
    "none": NoCache(),
    "dual": DualCache(),
    "dual, interval": DualCache(interval=3),
    "prefix": PrefixCache(),
    "vicinity": VicinityCache(warmup=2, look_back=3, look_ahead=2),
    "interval": IntervalCache(interval=3),
    "max-logit": MaxLogitCache(ratio=0.7, warmup=0.1, interval=4),
    "max-logit, upstream": MaxLogitCache(ratio=0.7, warmup=0.1, interval=4, compat="upstream"),
    "adaptive": AdaptiveCache(prompt_interval=5, response_interval=3),
    "adaptive, no comparison": AdaptiveCache(prompt_interval=4, response_interval=2, ratio=0.0, full_layers=()),
    "adaptive, upstream": AdaptiveCache(prompt_interval=4, response_interval=7, compat="upstream"),
}
IMAGE = Modality.IMAGE


def prompt(tokens: int) -> TokenRun:
    return TokenRun(tokens, given=True)


SCHEDULES = {
    "text": RowDecode((prompt(3), TokenRun(14, 11)), block=4, passes=3),
    "text, then image": RowDecode((prompt(2), TokenRun(8, 11), TokenRun(6, 7, IMAGE)), block=4, passes=4),
    "short prompt": RowDecode((prompt(1), TokenRun(13, 11)), block=8, passes=4),
    "holes": RowDecode((prompt(1), TokenRun(4, 11), prompt(2), TokenRun(5, 11), prompt(1)), block=4, passes=3),
}


def make_model(**kwargs) -> MaskedTransformer:
    torch.manual_seed(2)
    settings = dict(hidden_size=16, num_layers=3, num_heads=4, num_kv_heads=2) | kwargs
    model = MaskedTransformer(VOCABULARY.size, **settings).eval()
    for p in model.parameters():
        p.data.add_(torch.randn_like(p) * 0.35)
    return model


def decode(model, policy, schedule: RowDecode, guidance: float = 1.0, rows: int = 1):
    """The decode that a schedule describes."""
    spans = [
        Span.masked_image((2, s.tokens // 2), VOCABULARY)
        if s.modality == IMAGE
        else Span.text([i % 11 for i in range(s.tokens)], s.given)
        for s in schedule.segments
    ]
    text, image = (
        ModalityDecoding(max(schedule.steps(m), 1), "quota", "fixed", block_length=schedule.block) for m in Modality
    )
    config = SamplerConfig(text, image, Guidance(guidance), order="text_first", stop_at_eos=False)
    batch = TokenBatch.from_spans([spans] * rows)
    return Sampler(model, VOCABULARY, config, policy)(batch, torch.arange(rows))


def test_a_token_costs_what_the_matrices_say():
    """d = 4, 2 heads of which one is shared, f = 6: matrices of 4 x 4, 4 x 2 twice, 4 x 4 and three of 4 x 6."""
    shape = dict(hidden_size=4, num_heads=2, num_kv_heads=1, num_layers=2, ffn_size=6, rope="1d")
    traits = MaskedTransformer(9, **shape).traits
    layer = traits.layers[0]
    assert (layer.query, layer.key, layer.value, layer.output) == (2 * 4 * 4, 2 * 4 * 2, 2 * 4 * 2, 2 * 4 * 4)
    assert layer.feed_forward == 2 * 3 * 4 * 6 and layer.token == 48 + 16 + 32 + 144
    assert layer.pair == 16  # 2 heads x (2 x 2 for the score + 2 x 2 for the mix)
    assert RowWork.even(2, 10, 10).flops(traits) == 2 * (10 * 240 + 10 * 10 * 16)
    assert RowWork.even(2, 3, 10, head=2, ids=9).flops(traits) == 2 * (3 * 240 + 3 * 10 * 16) + 2 * 2 * 4 * 9
    assert MaskedTransformer(9, **shape, activation="gelu").traits.layers[0].feed_forward == 2 * 2 * 4 * 6
    uneven = RowWork((LayerWork(k=1, v=5, out=1), LayerWork(5, 5, 5)), keys=5)
    assert uneven.flops(traits) == (48 + 5 * 16 + 32 + 144 + 5 * 16) + (5 * 240 + 5 * 5 * 16)


def test_without_shared_heads_a_token_costs_8dd_plus_6df():
    layer = make_model(num_kv_heads=None, ffn_size=24).traits.layers[0]
    assert layer.token == 8 * 16 * 16 + 6 * 16 * 24
    linear = sum(
        p.numel() for n, p in make_model(num_kv_heads=None, ffn_size=24).blocks[0].named_parameters() if p.ndim > 1
    )
    assert layer.token == 2 * linear


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())
def test_a_decode_costs_exactly_what_its_formula_says(policy, schedule):
    model = make_model()
    stats = decode(model, policy, schedule).stats
    passes = expected_passes(policy, schedule, model.config.num_layers, narrows=True)
    assert stats.evaluations == len(passes)
    assert stats.key_tokens == sum(w.k for p in passes for w in p.layers)
    assert stats.value_tokens == sum(w.v for p in passes for w in p.layers)
    assert stats.query_tokens == sum(w.out for p in passes for w in p.layers)
    layer = model.traits.layers[0]
    assert stats.linear_flops == sum(layer.linear(w) for p in passes for w in p.layers)
    assert stats.attention_flops == sum(layer.attention(w, schedule.length) for p in passes for w in p.layers)
    assert stats.full_passes == sum(all(w.k == schedule.length for w in p.layers) for p in passes)
    assert stats.full_passes + stats.partial_passes == len(passes)
    if getattr(policy, "compat", None) is None:
        assert stats.head_tokens == sum(p.head for p in passes)
        assert stats.head_flops == sum(model.traits.head_flops(p.head, p.ids) for p in passes)
        assert stats.flops == sum(p.flops(model.traits) for p in passes)
        assert stats.to_dict()["flops"] == stats.flops


@pytest.mark.parametrize("name", ["none", "dual", "adaptive"])
def test_rows_and_guidance_streams_multiply_the_cost(name):
    """Two rows that do the same at the same time, in two streams."""
    schedule, model = SCHEDULES["text"], make_model()
    one = decode(model, POLICIES[name], schedule).stats
    many = decode(model, POLICIES[name], schedule, guidance=2.0, rows=2).stats
    assert many.evaluations == 2 * one.evaluations
    counts = ("key_tokens", "value_tokens", "query_tokens", "linear_flops", "attention_flops")
    for count in counts:
        assert getattr(many, count) == 4 * getattr(one, count), count
    for count in ("head_tokens", "head_flops"):  # the streams' features are blended before the head
        assert getattr(many, count) == 2 * getattr(one, count), count
    assert many.store_bytes == 4 * one.store_bytes  # nothing is kept for a stream that is never used


def test_the_store_is_weighed():
    schedule, model = SCHEDULES["text"], make_model()
    places = schedule.length + 1
    keys_and_values = 3 * places * 2 * 8 * 4  # layers, places, K and V, 2 heads of 4, float32
    assert decode(model, NoCache(), schedule).stats.store_bytes == 0
    assert decode(model, DualCache(), schedule).stats.store_bytes == keys_and_values + places * 16 * 4
    outputs = 2 * 3 * places * 16 * 4
    assert decode(model, AdaptiveCache(), schedule).stats.store_bytes == keys_and_values + outputs + places * 16 * 4
    # rows of different progress refresh apart, in features of their own
    text = ModalityDecoding(rule="threshold", threshold=0.3, temperature=0.0, block_length=3)
    batch = TokenBatch.from_spans([[Span.text([i, 2], True), Span.masked_text(12, VOCABULARY)] for i in range(3)])
    out = Sampler(model, VOCABULARY, SamplerConfig(text), DualCache())(batch, torch.arange(3))
    store = 3 * (3 * 15 * 16 * 4 + 15 * 16 * 4)
    assert store < out.stats.store_bytes <= 2 * store
    assert out.stats.forward_seconds > 0


def test_other_denoisers_have_passes_but_no_flops():
    class Uniform:
        def hidden(self, ids, modality, positions, mask, time=None):
            return torch.zeros(*ids.shape, 4)

        def head(self, hidden, start=0, stop=None):
            return torch.zeros(*hidden.shape[:-1], stop - start)

    stats = decode(Uniform(), NoCache(), SCHEDULES["text"]).stats
    assert stats.evaluations == 11 and stats.model_tokens == 11 * 17 and stats.flops == 0


with torch.device("meta"):
    WIDE = MaskedTransformer(32, hidden_size=512, num_layers=8, num_heads=8, ffn_size=1365).traits
WIDE = replace(WIDE, narrows=False)
"""The shape of the formulas' examples, which count all positions in every layer."""


def test_reference_bounds_are_the_papers_numbers():
    every = RowDecode((TokenRun(128, 1000), TokenRun(1024, 1000, IMAGE)), block=64, passes=16)
    picture = RowDecode((prompt(128), TokenRun(1024, 1000, IMAGE)), block=64, passes=16)
    assert len(every.blocks) == 18 and every.length == picture.length == 1152
    assert DualCache().reference_bound(every, WIDE) == pytest.approx(16 / (1 + 15 * 64 / 1152))
    assert DualCache().reference_bound(every, WIDE) == pytest.approx(8.73, abs=0.01)
    assert PrefixCache().reference_bound(every, WIDE) == pytest.approx(1.79, abs=0.01)
    adaptive = AdaptiveCache(50, 7, 0.25, full_layers=())
    assert adaptive.reference_bound(picture, WIDE) == pytest.approx(2.72, abs=0.01)
    assert AdaptiveCache(50, 7, 0.25).reference_bound(picture, WIDE) == pytest.approx(2.24, abs=0.01)
    sixty_four = RowDecode((TokenRun(64, 10),), block=64, passes=64)
    assert MaxLogitCache().reference_bound(sixty_four, WIDE) == pytest.approx(2.03, abs=0.005)
    assert NoCache().reference_bound(every, WIDE) is None
    assert DualCache(interval=4).reference_bound(every, WIDE) is None


def test_bounds_of_flops_meet_the_reference_where_only_tokens_count():
    """Without a head, work is proportional to the tokens, attention included."""
    schedule = RowDecode((TokenRun(128), TokenRun(1024, 0, IMAGE)), block=64, passes=16)
    for policy in (DualCache(), PrefixCache()):
        bound = speedup_bound(policy, schedule, WIDE)
        assert bound == pytest.approx(policy.reference_bound(schedule, WIDE), rel=1e-9)
    assert speedup_bound(NoCache(), schedule, WIDE) == 1
    with_head = RowDecode((TokenRun(128, 30000), TokenRun(1024, 30000, IMAGE)), block=64, passes=16)
    assert speedup_bound(DualCache(), with_head, WIDE) < speedup_bound(DualCache(), schedule, WIDE)


def test_slower_small_products_lower_the_bound():
    """64 rows at half the rate count double: 16 / (1 + 15 x 64 / 1152 x 2)."""
    schedule = RowDecode((TokenRun(1152),), block=64, passes=16)
    rate = lambda rows: 1e9 if rows > 64 else 0.5e9  # noqa: E731
    assert speedup_bound(DualCache(), schedule, WIDE, rate) == pytest.approx(16 / (1 + 15 * 64 / 1152 * 2))
    assert speedup_bound(DualCache(), schedule, WIDE, lambda rows: 3e9) == pytest.approx(8.73, abs=0.01)


def test_what_cannot_be_foretold_is_refused():
    with pytest.raises(ValueError, match="drift"):
        expected_passes(DualCache(drift=0.5), SCHEDULES["text"], 2)

    class Own(Policy):
        """Says nothing of its work."""

    with pytest.raises(ValueError, match="Own cannot be foretold"):
        expected_passes(Own(), SCHEDULES["text"], 2)


@pytest.mark.parametrize("value", ["x", None, [], -1, 2**70, float("nan"), True, 1.5, 10**9], ids=str)
def test_schedules_of_other_values_are_refused(value):
    with pytest.raises(ValueError, match="segment tokens is"):
        TokenRun(value)
    for name in ("segments", "block", "passes"):
        if (name, value) != ("passes", 10**9):
            with pytest.raises(ValueError, match=f"row decode {name} is"):
                RowDecode(**({"segments": (TokenRun(4),), "block": 2, "passes": 1} | {name: value}))


@pytest.mark.parametrize(("steps", "block"), [(63, 63), (64, 10), (7, 20), (3, 5), (40, 7)])
def test_a_schedule_of_so_many_steps_is_a_decode_of_so_many(steps, block):
    """With a fraction for the passes of a block, as the choice of a cache asks for."""
    schedule = RowDecode((prompt(3), TokenRun(64, 11)), block, Fraction(steps * block, 64))
    blocks = -(-64 // block)
    assert schedule.steps(Modality.TEXT) == steps
    assert len(list(moments(schedule))) == sum(schedule.passes_of(Modality.TEXT)) == max(steps, blocks)
    model = make_model()
    stats = decode(model, DualCache(), schedule).stats
    passes = expected_passes(DualCache(), schedule, model.config.num_layers, narrows=True)
    assert stats.evaluations == len(passes)
    assert stats.key_tokens == sum(w.k for p in passes for w in p.layers)
    # behind the last layer, numbers of candidates are rounded up to few widths
    assert stats.query_tokens >= sum(w.out for p in passes for w in p.layers)


def test_schedules_know_their_blocks():
    schedule = RowDecode((prompt(2), TokenRun(4, 7, IMAGE), TokenRun(7, 11)), block=4, passes=2)
    assert schedule.blocks == [(6, 4, 11), (10, 3, 11), (2, 4, 7)]  # text first
    assert [schedule.steps(m) for m in Modality] == [4, 2] and (schedule.length, schedule.prompt) == (13, 2)
    with pytest.raises(ValueError, match="a segment of 3 tokens is no whole number of blocks of 4"):
        RowDecode((TokenRun(3), prompt(1), TokenRun(4)), block=4, passes=2)
    with pytest.raises(ValueError, match="not given"):
        RowDecode((prompt(3),), block=4, passes=2)
