"""What a row does is its own: times, guidance intervals, layers of a segment, caches by row, and ties."""

from __future__ import annotations

import pytest
import torch
from cache_cases import VOCABULARY, decode, make_model
from sampler_space import Foreign

from unidiff.decoding import Guidance, ModalityDecoding, NoCache, SamplerConfig
from unidiff.decoding.cache import (
    AdaptiveCache,
    BlockCausalCache,
    CacheByRow,
    DualCache,
    HeldGuidance,
    IntervalCache,
    MaxLogitCache,
    SegmentCache,
)
from unidiff.tokens import Span, TokenBatch

WORDS = [Span.text([3, 1, 4], True), Span.masked_text(6, VOCABULARY)]
PICTURE = [Span.text([3, 5], True), Span.masked_image((3, 3), VOCABULARY)]
BOTH = [Span.text([3], True), Span.masked_text(4, VOCABULARY), Span.masked_image((2, 3), VOCABULARY)]


def rows_of(*spans) -> list[TokenBatch]:
    return [TokenBatch.from_spans([row]) for row in spans]


def check_rows(model, config, policy, rows, seeds, length=23):
    together = decode(model, config, policy, TokenBatch.cat(rows).pad_to(length), seeds)
    for i, row in enumerate(rows):
        alone = decode(model, config, policy, row, [seeds[i]])
        assert torch.equal(together.batch.ids[i : i + 1, : row.shape[1]], alone.batch.ids)
    return together


class Timed(Foreign):
    """Notes the times it is given, row by row."""

    def __init__(self, inner) -> None:
        super().__init__(inner)
        self.times: list[torch.Tensor] = []

    def hidden(self, ids, modality, positions, attention_mask, time=None):
        self.times.append(time.clone())
        return super().hidden(ids, modality, positions, attention_mask, time)


@pytest.mark.parametrize("order", ["together", "text_first", "level"])
def test_the_time_of_a_row_is_that_of_what_it_has_to_fill(order) -> None:
    """A row without pictures does not stay at time 1 because another one has a picture, and a finished text does not count."""
    config = SamplerConfig(
        ModalityDecoding(steps=3, schedule="fixed"), ModalityDecoding(steps=5, schedule="linear"), order=order
    )
    rows = rows_of(WORDS, PICTURE, BOTH)
    seen = []
    for batch, seeds in [(TokenBatch.cat(rows), [5, 6, 7]), *((row, [5 + i]) for i, row in enumerate(rows))]:
        model = Timed(make_model(time_conditioning=True, cond_dim=8))
        decode(model, config, NoCache(), batch, seeds)
        seen.append(model.times)
    assert [float(t[0]) for t in seen[1]] == pytest.approx([1, 2 / 3, 1 / 3])
    assert [float(t[0]) for t in seen[2]] == pytest.approx([1, 0.8, 0.6, 0.4, 0.2])
    if order == "together":
        assert [float(t[0]) for t in seen[3]] == pytest.approx([1, 0.8, 0.6, 0.4, 0.2])
    first = seen[0][: min(len(times) for times in seen[1:])]  # finished rows take part in no further pass
    for number, times in enumerate(first):
        for row in range(3):
            assert float(times[row]) == float(seen[1 + row][number][0])


@pytest.mark.parametrize("inner", [NoCache(), DualCache(interval=4), IntervalCache(3), MaxLogitCache(0.5, 0.1, 3)])
@pytest.mark.parametrize("foreign", [False, True])
def test_guidance_intervals_are_counted_by_rows(inner, foreign) -> None:
    """With a coin per position, rows sit passes out, each its own ones; windows open for each at another time."""
    model = make_model()
    model = Foreign(model).double() if foreign else model
    for guidance in (Guidance(3.0), Guidance(3.0, mode="window", window=(0.2, 0.7)), Guidance(2.0, hide="other")):
        config = SamplerConfig(
            ModalityDecoding(steps=14, rule="ancestral"),
            ModalityDecoding(rule="threshold", threshold=0.4, block_length=4),
            guidance,
        )
        rows = rows_of(WORDS, PICTURE, BOTH, WORDS, BOTH)
        out = check_rows(model, config, HeldGuidance(inner, 3, 0), rows, [1, 2, 3, 4, 5])
        full = check_rows(model, config, inner, rows, [1, 2, 3, 4, 5])
        assert out.nfe < full.nfe


def test_layers_of_a_segment_are_those_of_rows_that_have_it() -> None:
    """A row of pictures alone is not refreshed in the layers that another row's words ask for."""
    text = AdaptiveCache(prompt_interval=4, response_interval=5, ratio=0.3, full_layers=(0, 1))
    config = SamplerConfig(ModalityDecoding(steps=5), ModalityDecoding(steps=8, temperature=0.0), Guidance(2.0))
    policy = SegmentCache(text, MaxLogitCache(0.8, 0.0, 6), IntervalCache(5), DualCache())
    for model in (make_model(), make_model(time_conditioning=True, cond_dim=8), Foreign(make_model())):
        for seed in range(4):
            check_rows(model, config, policy, rows_of(WORDS, PICTURE, BOTH), [seed, seed + 9, seed + 5])


def test_every_row_has_its_own_cache() -> None:
    config = SamplerConfig(ModalityDecoding(steps=6), ModalityDecoding(steps=7), Guidance(2.0, image_scale=3.0))
    policies = [NoCache(), HeldGuidance(IntervalCache(3), 2, 1), SegmentCache(DualCache(), IntervalCache(4))]
    rows, seeds, model = rows_of(WORDS, BOTH, PICTURE, BOTH), [1, 2, 3, 4], make_model()
    choice = [1, 2, 1, 0]
    out = decode(model, config, CacheByRow(policies, choice), TokenBatch.cat(rows), seeds)
    assert out.stats.partial_passes > 0
    for i, row in enumerate(rows):
        alone = decode(model, config, policies[choice[i]], row, [seeds[i]])
        assert torch.equal(out.batch.ids[i : i + 1, : row.shape[1]], alone.batch.ids)


def test_caches_by_row_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="block-causal cache is exact"):
        CacheByRow([BlockCausalCache()], [0])
    with pytest.raises(ValueError, match="look at different features"):
        CacheByRow([AdaptiveCache(), DualCache()], [0, 1])
    with pytest.raises(ValueError, match="look at different features"):
        CacheByRow([MaxLogitCache(), MaxLogitCache(compat="upstream")], [0, 1])
    with pytest.raises(ValueError, match="a row has policy 2; expected numbers from 0 to 0"):
        CacheByRow([DualCache()], [0, 2])
    with pytest.raises(ValueError, match="policies for 1 rows, but the batch has 2"):
        decode(
            make_model(), SamplerConfig(), CacheByRow([DualCache()], [0]), TokenBatch.cat(rows_of(WORDS, WORDS)), [1, 2]
        )


@pytest.mark.parametrize("confidence", ["probability", "margin", "entropy"])
@pytest.mark.parametrize("rule", ["quota", "threshold", "factor", "hierarchical", "credit"])
def test_a_row_with_nothing_given_is_filled_from_the_left(rule, confidence) -> None:
    """All positions look the same to the model; in float32 only rounding tells them apart, and it may not decide."""
    model = make_model(rope="1d", modality_embedding=False).float()
    settings = ModalityDecoding(
        rule=rule, confidence=confidence, steps=3, schedule="fixed", temperature=0.0, threshold=2.0, low_threshold=2.0
    )
    config = SamplerConfig(text=settings, stop_at_eos=False)
    for length in (3, 7, 12, 17):
        row = TokenBatch.from_spans([[Span.masked_text(length, VOCABULARY)]])
        others = [TokenBatch.from_spans([[Span.masked_text(n, VOCABULARY)]]) for n in (5, 19, 2, 11)]
        alone = decode(model, config, NoCache(), row, [1])
        batch = TokenBatch.cat([others[0], row, *others[1:]]).pad_to(24)
        together = decode(model, config, NoCache(), batch, [2, 1, 3, 4, 5])
        first = alone.trajectory[1][0] != VOCABULARY.mask_id
        assert first[: int(first.sum())].all()
        for ids, other in zip(alone.trajectory, together.trajectory, strict=False):
            assert torch.equal(ids[0], other[1, :length])
