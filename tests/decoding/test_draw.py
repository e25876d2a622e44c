"""Draws: the inverse CDF is exact, filters keep what they say, noise is keyed by row, step and place."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unidiff.decoding import ModalityDecoding
from unidiff.decoding.draw import (
    RowNoise,
    choose,
    confidence_of,
    draw_tokens,
    gumbel,
    inverse_cdf,
    kept_tokens,
    tempered,
)


def test_inverse_cdf_switches_exactly_at_the_cumulative_sums() -> None:
    p = torch.tensor([0.25, 0.0, 0.5, 0.25], dtype=torch.float64)
    u = torch.tensor([1e-300, 0.25 - 2**-54, 0.25, 0.75 - 2**-53, 0.75, 1 - 2**-53], dtype=torch.float64)
    assert inverse_cdf(p.expand(len(u), 4), u).tolist() == [0, 0, 2, 2, 3, 3]


def test_rare_tokens_keep_their_rate() -> None:
    """A token of probability 1e-12 owns a stretch of 1e-12 of the uniform: float32 Gumbel noise would lose it."""
    p = torch.tensor([1 - 1e-12, 1e-12], dtype=torch.float64)
    edge = 1 - 1e-12
    u = torch.tensor([edge - 1e-15, edge + 1e-15], dtype=torch.float64)
    assert inverse_cdf(p.expand(2, 2), u).tolist() == [0, 1]


@given(st.lists(st.floats(0, 10), min_size=1, max_size=12).filter(lambda p: sum(p) > 0), st.floats(1e-12, 1 - 1e-12))
def test_inverse_cdf_never_returns_an_impossible_token(p: list[float], u: float) -> None:
    token = inverse_cdf(torch.tensor([p], dtype=torch.float64), torch.tensor([u], dtype=torch.float64)).item()
    assert p[token] > 0


@given(st.integers(0, 2**31), st.integers(1, 9), st.floats(0.05, 1.0), st.sampled_from([0.5, 1.0, 2.0]))
@settings(max_examples=60, deadline=None)
def test_filters_keep_the_best_tokens(seed: int, top_k: int, top_p: float, temperature: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(40, 9, generator=generator) * 2
    u = torch.rand(40, generator=generator, dtype=torch.float64).clamp(1e-12, 1 - 1e-12)
    p = (logits.double() / temperature).softmax(-1)
    by_k = draw_tokens(logits, u, temperature, top_k, None)
    assert ((p > p.gather(1, by_k[:, None])).sum(1) < top_k).all()
    by_p = draw_tokens(logits, u, temperature, None, top_p)
    mass_above = torch.where(p > p.gather(1, by_p[:, None]), p, 0.0).sum(1)
    assert (mass_above < top_p).all()


def test_filters_keep_exactly_k_and_the_smallest_set_reaching_p() -> None:
    p = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    assert kept_tokens(p, 3, None).tolist() == [True, True, True, False]
    assert kept_tokens(p, None, 0.7).tolist() == [True, True, False, False]
    assert kept_tokens(p, None, 0.71).tolist() == [True, True, True, False]
    assert kept_tokens(p, None, 1e-9).tolist() == [True, False, False, False]
    assert kept_tokens(torch.full((4,), 0.25), 2, None).sum() == 2  # ties do not widen the set


COLD = [5e-324, 1e-308, 2.3e-308, 1e-300, 1e-100, 1e-20]
HOT = [1e20, 1e100, 1e300, 1e308, 1.7976931348623157e308]


@pytest.mark.parametrize("top", [(None, None), (3, None), (None, 0.9), (2**62, 1.0), (3, 1e-308)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_every_temperature_gives_a_law(dtype: torch.dtype, top: tuple[int | None, float | None]) -> None:
    """Near 0 the best token, evenly among exact ties; near infinity every token that is possible at all."""
    logits = torch.tensor([-1.0, 3.0, -torch.inf, 2.5, 3.0, 0.0, -80.0, -2000.0], dtype=dtype)
    n = 4000
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    counts = {}
    for temperature in COLD + HOT:
        tokens = draw_tokens(logits.expand(n, -1), u, temperature, *top)
        counts[temperature] = torch.bincount(tokens, minlength=8).tolist()
    kept = {(3, None): [1, 3, 4], (None, 0.9): [0, 1, 3, 4, 5, 6, 7], (3, 1e-308): [1]}.get(top, [0, 1, 3, 4, 5, 6, 7])
    for temperature in COLD:
        alone = top == (3, 1e-308)
        assert counts[temperature] == [0, n if alone else n // 2, 0, 0, 0 if alone else n // 2, 0, 0, 0], temperature
    for temperature in HOT[1:]:
        shares = [counts[temperature][token] / n for token in kept]
        assert shares == pytest.approx([1 / len(kept)] * len(kept), abs=2 / n), temperature
        assert sum(counts[temperature][token] for token in kept) == n


@given(
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=9),
    st.floats(min_value=5e-324, max_value=1.7976931348623157e308),
    st.sampled_from([None, 1, 2, 2**62]),
    st.sampled_from([None, 5e-324, 1e-300, 0.5, 1 - 2**-53, 1.0]),
    st.floats(1e-12, 1 - 1e-12),
)
@settings(max_examples=300, deadline=None, derandomize=True)
def test_no_float_draws_an_impossible_token(
    logits: list[float], temperature: float, top_k: int | None, top_p: float | None, u: float
) -> None:
    row = torch.tensor([logits])
    token = draw_tokens(row, torch.tensor([u], dtype=torch.float64), temperature, top_k, top_p).item()
    law = tempered(row, temperature)[0]
    assert law.isfinite().all() and law.sum() == pytest.approx(1) and law[token] > 0
    if top_k is not None:
        assert (row[0] > row[0, token]).sum() < top_k
    if top_p is not None and top_p < 1e-200:
        assert row[0, token] == row.max()


def test_the_smallest_temperature_survives_a_processor_that_flushes_small_numbers() -> None:
    logits, u = torch.tensor([[1.0, 2.0, 0.5]]), torch.tensor([0.9], dtype=torch.float64)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor keeps small numbers")
    try:
        assert draw_tokens(logits, u, 5e-324, None, None).item() == 1
    finally:
        torch.set_flush_denormal(False)


def test_the_whole_of_the_probability_keeps_every_token() -> None:
    p = torch.full((10_000,), 1 / 10_000, dtype=torch.float64)
    assert kept_tokens(p, None, 1.0).all() and kept_tokens(p, None, 1.0 - 2**-53).sum() >= 9_999


def test_filtered_draw_has_the_renormalised_law() -> None:
    p = torch.tensor([0.1, 0.4, 0.2, 0.3], dtype=torch.float64)
    n = 4000
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    tokens = draw_tokens(p.log().expand(n, 4), u, 1.0, 2, None)
    share = torch.bincount(tokens, minlength=4) / n
    torch.testing.assert_close(share, torch.tensor([0, 4 / 7, 0, 3 / 7]), atol=1 / n, rtol=0)


def test_confidence_measures() -> None:
    p = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64)
    chosen, noise = torch.tensor([0.3], dtype=torch.float64), torch.tensor([0.77], dtype=torch.float64)
    values = {m: confidence_of(p, chosen, m, noise).item() for m in ("probability", "margin", "entropy", "random")}
    entropy = -sum(x * math.log(x) for x in (0.5, 0.3, 0.2))
    assert values == pytest.approx({"probability": 0.3, "margin": 0.2, "entropy": -entropy, "random": 0.77})
    certain = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    assert confidence_of(certain, chosen, "entropy", noise).item() == 0  # not NaN


def test_confidence_ignores_temperature_and_filters() -> None:
    logits = torch.tensor([[[2.0, 1.0, 0.0]]])
    u, is_real = torch.tensor([[0.5]], dtype=torch.float64), torch.ones(1, 1, dtype=torch.bool)
    hot = choose(logits[None], is_real, ModalityDecoding(temperature=5.0, top_k=1), u, u)
    assert hot.token.item() == 0
    assert hot.probability.item() == pytest.approx(logits.softmax(-1)[0, 0, 0].item())


def test_choosing_in_chunks_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(3, 17, 5, generator=torch.Generator().manual_seed(0))
    u = torch.rand(3, 17, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    is_real = torch.ones(3, 17, dtype=torch.bool)
    whole = choose(logits[None], is_real, ModalityDecoding(), u, u)
    monkeypatch.setattr("unidiff.decoding.draw.CHUNK", 30)
    parts = choose(logits[None], is_real, ModalityDecoding(), u, u)
    assert torch.equal(whole.token, parts.token) and torch.equal(whole.confidence, parts.confidence)


@given(st.integers(-(2**62), 2**62), st.integers(0, 50), st.integers(0, 4), st.integers(1, 5), st.integers(1, 5))
def test_noise_does_not_see_batch_or_padding(seed: int, step: int, use: int, left: int, right: int) -> None:
    length = 6
    alone = RowNoise(torch.tensor([seed]), torch.ones(1, length, dtype=torch.bool))(step, use)
    valid = torch.zeros(3, left + length + right, dtype=torch.bool)
    valid[1, left : left + length] = True
    valid[2, :] = True
    batched = RowNoise(torch.tensor([7, seed, 9]), valid)(step, use)
    assert torch.equal(alone[0], batched[1, left : left + length])
    assert not torch.equal(batched[1], batched[2])
    assert (batched > 0).all() and (batched < 1).all()


def test_gumbel_noise_has_its_mean() -> None:
    u = RowNoise(torch.arange(50), torch.ones(50, 200, dtype=torch.bool))(0, 2)
    assert gumbel(u).mean().item() == pytest.approx(0.5772, abs=0.05)


def test_seeds_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="seeds have shape"):
        RowNoise(torch.zeros(2, dtype=torch.long), torch.ones(3, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="expected int64"):
        RowNoise(torch.zeros(3), torch.ones(3, 4, dtype=torch.bool))
