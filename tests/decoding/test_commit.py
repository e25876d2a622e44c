"""Commit rules: quotas sum exactly, thresholds take at least one, selections are per row."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from golden import golden_folders
from hypothesis import given, settings
from hypothesis import strategies as st

from unidiff.decoding.commit.ancestral import remdm_sigma, unmask_chance
from unidiff.decoding.commit.base import progress, quota, slack_of, take_best, unsure_tokens
from unidiff.decoding.commit.factor import factor_count
from unidiff.decoding.commit.threshold import above_threshold
from unidiff.decoding.config import RULES, ModalityDecoding
from unidiff.decoding.draw import choose, gather_positions
from unidiff.diffusion.schedules import SCHEDULES, get_schedule


def pick(own: ModalityDecoding, confidence, is_real, count=None, index=None) -> torch.Tensor:
    """What the rule of these settings takes of a pass."""
    rule = RULES[own.rule](own, is_real)
    return rule.pick(confidence, confidence, is_real, is_real.sum(1) if count is None else count, index)


@given(st.sampled_from(["fixed", *SCHEDULES]), st.integers(1, 300), st.integers(1, 70))
@settings(max_examples=100, deadline=None)
def test_quotas_sum_exactly_and_never_stall(schedule: str, masked: int, steps: int) -> None:
    start, remaining, taken = torch.tensor([masked]), torch.tensor([masked]), []
    for step in range(steps):
        k = quota(schedule, start, remaining, torch.tensor([step]), torch.tensor([steps]))
        assert k.item() >= (remaining.item() > 0)
        taken.append(k.item())
        remaining = remaining - k
    assert sum(taken) == masked and remaining.item() == 0
    if schedule == "fixed" and steps <= masked:
        assert taken == [masked // steps + (i < masked % steps) for i in range(steps)]


def test_quota_is_per_row_and_catches_up_after_remasking() -> None:
    start = torch.tensor([10, 10, 4, 0])
    remaining = torch.tensor([5, 8, 1, 0])  # row 1 had three tokens masked again
    k = quota("linear", start, remaining, torch.full((4,), 5), torch.full((4,), 10))
    assert k.tolist() == [1, 4, 1, 0]


def test_take_best_breaks_ties_to_the_left_and_skips_dead_entries() -> None:
    score = torch.tensor([[0.5, 0.9, 0.9, 0.9, 0.1], [1.0, 1.0, 1.0, 1.0, 1.0]])
    is_real = torch.tensor([[True, True, False, True, True], [False, False, True, True, False]])
    assert take_best(score, is_real, torch.tensor([1, 9])).tolist() == [
        [False, True, False, False, False],
        [False, False, True, True, False],
    ]


def test_take_best_finds_live_entries_of_score_minus_infinity() -> None:
    score = torch.tensor([[0.0, -torch.inf, -torch.inf]])
    assert take_best(score, torch.tensor([[False, False, True]]), torch.tensor([1])).tolist() == [[False, False, True]]


@given(st.integers(0, 2**31), st.floats(0, 1), st.floats(0, 4))
@settings(max_examples=60, deadline=None)
def test_threshold_and_factor_take_at_least_one(seed: int, threshold: float, factor: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    confidence = torch.rand(5, 8, generator=generator, dtype=torch.float64)
    is_real = torch.rand(5, 8, generator=generator) < 0.5
    picked = above_threshold(confidence, is_real, threshold)
    best = torch.where(is_real, confidence, -1.0).amax(1, keepdim=True)
    assert torch.equal(picked, is_real & ((confidence >= threshold) | (confidence == best)))
    count = factor_count(confidence, is_real, factor)
    for row in range(5):
        ranked = sorted(confidence[row][is_real[row]].tolist(), reverse=True)
        length = 0
        while length < len(ranked) and (length == 0 or ranked[length] >= 1 - factor / (length + 2)):
            length += 1
        assert count[row].item() == length


@pytest.mark.golden
def test_factor_rule_of_the_golden_set() -> None:
    folders = golden_folders("toy_exact")
    if not folders:
        pytest.skip("golden/toy_exact is absent")
    for folder in folders:
        for case in json.loads((folder / "toy_exact.json").read_text())["parallel_greedy"]["factor_rule"]:
            confidence = torch.tensor([case["sorted_confidences"]], dtype=torch.float64)
            is_real = torch.ones_like(confidence, dtype=torch.bool)
            assert factor_count(confidence, is_real, case["factor"]).item() == case["selected"], case


@given(st.integers(1, 40), st.sampled_from(["linear", "cosine", "square"]), st.floats(0, 1))
@settings(max_examples=50, deadline=None)
def test_ancestral_marginals_follow_alpha_with_and_without_remasking(steps: int, schedule: str, cap: float) -> None:
    """masked_s = masked_t (1 - reveal) + known_t sigma must be 1 - alpha_s at every step."""
    n = torch.full((1,), steps)
    masked = torch.ones(1, dtype=torch.float64)
    for step in range(steps):
        k = torch.tensor([step])
        sigma = remdm_sigma(schedule, k, n, cap)
        reveal = unmask_chance(schedule, k, n, sigma)
        assert 0 <= sigma.item() <= cap + 1e-12 and -1e-12 <= reveal.item() <= 1 + 1e-12
        masked = masked * (1 - reveal) + (1 - masked) * sigma
        torch.testing.assert_close(masked, get_schedule(schedule).masked_share(progress(k + 1, n)), atol=1e-9, rtol=0)
    assert masked.item() == 0


def test_unsure_tokens_are_the_least_sure_and_within_budget() -> None:
    confidence = torch.tensor([[0.1, 0.5, 0.2, 0.9, 0.3]] * 3)
    candidates = torch.tensor([[True, True, True, True, False]] * 3)
    again = unsure_tokens(confidence, candidates, 0.6, torch.tensor([2, 9, 0]))
    assert again.tolist() == [
        [True, False, True, False, False],
        [True, True, True, False, False],
        [False] * 5,
    ]


@given(st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_hierarchical_takes_the_best_of_every_run(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    place = torch.rand(3, 12, generator=generator) < 0.6
    index, is_real = gather_positions(place, 9)
    confidence = (torch.rand(3, 9, generator=generator, dtype=torch.float64) * 8).round() / 8  # ties occur
    picked = pick(
        ModalityDecoding(rule="hierarchical", threshold=0.9, low_threshold=0.4), confidence, is_real, index=index
    )
    for row in range(3):
        sure = {int(i): float(c) for i, c, on in zip(index[row], confidence[row], is_real[row], strict=True) if on}
        expected = {i for i, c in sure.items() if c >= 0.9}
        if sure:
            expected.add(min(sure, key=lambda i: (-sure[i], i)))
        for start in (i for i in sure if i - 1 not in sure):
            run = [start]
            while run[-1] + 1 in sure:
                run.append(run[-1] + 1)
            best = min(run, key=lambda i: (-sure[i], i))
            if sure[best] >= 0.4:
                expected.add(best)
        assert {int(i) for i, on in zip(index[row], picked[row], strict=True) if on} == expected


def test_margin_decides_by_the_gap_to_the_second_best() -> None:
    """0.5 against 0.45 is less sure by margin than 0.45 against 0.1, although its probability is higher."""
    p = torch.tensor([[[0.5, 0.45, 0.05], [0.45, 0.1, 0.45 - 0.35]]], dtype=torch.float64)
    rule = ModalityDecoding(rule="threshold", threshold=0.3, confidence="margin", temperature=0.0)
    is_real, zeros = torch.ones(1, 2, dtype=torch.bool), torch.full((1, 2), 0.5, dtype=torch.float64)
    for measure, expected in (("margin", [False, True]), ("probability", [True, True])):
        own = replace(rule, confidence=measure)
        choice = choose(p.log()[None], is_real, own, zeros, zeros)
        index, count = torch.tensor([[3, 7]]), torch.tensor([1])
        assert pick(own, choice.confidence, is_real, count, index)[0].tolist() == expected


def test_positions_equal_but_for_rounding_are_taken_from_the_left() -> None:
    """Float32 noise on equal scores does not choose; what is clearly better comes first, and counts stay."""
    noise = torch.randn(200, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 1e-7
    equal, is_real = 0.4 + noise, torch.ones(200, 12, dtype=torch.bool)
    equal[:, 7] = 0.7
    is_real[:, 0] = False
    for count in range(13):
        chosen = take_best(equal, is_real, torch.full((200,), count), slack_of("probability"))
        expected = ([7] + [i for i in range(1, 12) if i != 7])[:count]
        assert torch.equal(
            chosen, torch.zeros_like(chosen).index_fill(1, torch.tensor(sorted(expected), dtype=torch.long), True)
        )
    index = torch.arange(12).expand(200, 12)
    settings = ModalityDecoding(rule="hierarchical", threshold=0.9, low_threshold=0.3)
    assert pick(settings, equal, is_real, is_real.sum(1), index)[:, 7].all()
    flat = 0.4 + noise
    for rule in ("threshold", "hierarchical", "factor", "credit", "quota"):
        for measure in ("probability", "margin", "entropy"):
            own = ModalityDecoding(rule=rule, confidence=measure, low_threshold=-9.0)
            value = flat - 2 if measure == "entropy" else flat
            chosen = pick(own, value, is_real, torch.ones(200, dtype=torch.long), index)
            assert torch.equal(chosen, torch.zeros_like(chosen).index_fill(1, torch.tensor([1]), True))


def test_a_clear_order_is_kept_near_certainty() -> None:
    """Confidences close to 1 are told apart by what is missing to 1; slack is relative to that."""
    missing = torch.tensor([[3e-9, 1e-9, 2e-9, 1e-9 * (1 + 1e-7)]], dtype=torch.float64)
    chosen = take_best(1 - missing, torch.ones(1, 4, dtype=torch.bool), torch.tensor([2]), slack_of("probability"))
    assert chosen.tolist() == [[False, True, False, True]]
    assert slack_of("random") is None


def test_the_least_sure_tokens_are_masked_again_from_the_left_where_they_are_equal() -> None:
    confidence = torch.full((50, 6), 0.3) + torch.randn(50, 6, generator=torch.Generator().manual_seed(1)) * 1e-8
    confidence[:, 4] = 0.2
    again = unsure_tokens(confidence, torch.ones(50, 6, dtype=torch.bool), 0.5, torch.full((50,), 3))
    assert (again == torch.tensor([True, True, False, False, True, False])).all()
